/*
 * Packets of a guest, as they are written to a pcapng file: by the Python handlers, by the engine and
 * by the ring's thread. Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* A frame of the largest MTU fits; of a longer one, so many bytes are written. */
#define PCAP_SNAP 65600
#define PCAP_ROOM 66752 /* a block with such a frame, and what is said of it */

#define PCAP_INBOUND 1 /* as the owner of the interface sees it */
#define PCAP_OUTBOUND 2
#define PCAP_DROPPED 0x100 /* the device did not take it */

struct pcap_packet {
    uint32_t interface; /* its number in the file */
    uint32_t direction; /* PCAP_INBOUND or PCAP_OUTBOUND */
    uint64_t time_ns;   /* since the epoch */
    uint64_t length;
    uint64_t lost;      /* packets that are missing before it */
    const void *frame;
    const char *comment; /* empty, or at most 1024 bytes of it */
};

/* An open file. */
struct pcap {
    int32_t fd;            /* -1: it has ended */
    _Atomic int32_t error; /* the errno that ended it, until Python has reported it */
    _Atomic int32_t busy;  /* a thread writes */
    uint32_t from, to;     /* the part of `block` that a FIFO has not taken yet */
    uint64_t lost;         /* packets since the last one that was written: the FIFO was full */
    uint8_t block[PCAP_ROOM];
};

/* Make an enhanced packet block in `to` (PCAP_ROOM bytes): its length. */
size_t pcap_block(void *to, const struct pcap_packet *packet);

/* Write a frame of the guest; `flags` are of the above, `time_ns` 0 is now. A FIFO that is full loses
 * it, and an error ends the file: then the result is 1, once. */
int pcap_write(struct pcap *pcap, uint64_t time_ns, uint32_t flags, const void *frame,
               uint64_t size);
