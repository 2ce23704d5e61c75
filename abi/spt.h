/*
 * What a guest for Solo5's spt target finds, ABI version 2. It makes system calls of Linux itself;
 * in the manifest, host_private is the descriptor of a device.
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

#define SPT_GUEST_START 0x10000 /* nothing is ever mapped below */
#define SPT_BOOT_INFO 0x11000   /* boot info, then the manifest, then the command line */
#define SPT_CONSOLE_FD 1
#define SPT_TIMER_DATA 0xfffffffe /* epoll_event.data of the timer; a device has its handle */

struct spt_boot_info {
    uint64_t mem_size;
    uint64_t kernel_end;
    uint64_t cmdline;  /* an address */
    uint64_t manifest; /* an address */
    int32_t epollfd;   /* it has every network device and the timer */
    int32_t timerfd;
};
