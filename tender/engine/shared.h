/*
 * What the vCPU's hypercalls (engine.c) and the network ring (ring.c) share: the guest's memory, its
 * devices, and their frames.
 */
#pragma once

#include "engine.h"

#define FRAME_MIN 14 /* an Ethernet header */

/* The memory [gpa, gpa + size) if the guest may name it, else NULL. */
void *guest_range(const struct engine *engine, uint64_t gpa, uint64_t size, int write);

/* The device of this handle and kind (ENGINE_*), else NULL. */
struct engine_device *device_of(struct engine *engine, uint64_t handle, int kind);

/* The vCPU and the ring count in the same cells. */
void count(_Atomic uint64_t *cell, uint64_t more);

/* Record a frame, where that is wanted; 1: the record has ended, and Python is to say so. */
int capture(const struct engine_device *device, uint32_t flags, const void *frame, uint64_t len);

/* Send one frame; 0 or an errno. A full queue drops it, as a wire does. */
int net_send(const struct engine_device *device, const void *frame, uint64_t len, int *has_report);

/* Receive one frame: its length, 0 when none waits, or -1 and errno. */
ssize_t net_receive(const struct engine_device *device, void *frame, uint64_t len, int *has_report);
