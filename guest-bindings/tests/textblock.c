/*
 * Asks the tender to write to the guest's read-only pages, in the way that the command line names:
 *   text, rodata        WALLTIME with its argument block there (text is the default)
 *   blockread, netread  data of a device that is to arrive in the code
 * The tender may end the guest, or answer with a result code; the pages must stay as they were.
 */
#include "check.h"
#include "raw.h"

enum { STORAGE = 1, SERVICE = 2 }; /* the manifest's order */
enum { FIVE_SECONDS = 5 };

/* Functions and constants of their own, so that only what this test aims at is hit. */
__attribute__((noinline, aligned(4096), used)) static void code(void)
{
    __asm__ volatile(".fill 4096, 1, 0x90");
}
static const uint8_t constants[64] __attribute__((aligned(64))) = {0x90, 0x90};

static int32_t read_frame(void *to)
{
    struct hvt_poll wait = {.timeout_nsecs = FIVE_SECONDS * UINT64_C(1000000000)};

    raw_hypercall(HVT_HYPERCALL_POLL, &wait);
    EXPECT(wait.ret == 1); /* whoever runs this sends a frame */
    return raw_net_io(HVT_HYPERCALL_NET_READ, SERVICE, to, 2048);
}

static void attack(const char *how, uint8_t *in_text)
{
    if (is_word(how, "rodata"))
        raw_hypercall(HVT_HYPERCALL_WALLTIME, constants);
    else if (is_word(how, "blockread"))
        EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_READ, STORAGE, 0, in_text, 512) != HVT_R_OK);
    else if (is_word(how, "netread"))
        EXPECT(read_frame(in_text) != HVT_R_OK);
    else
        raw_hypercall(HVT_HYPERCALL_WALLTIME, in_text);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    volatile uint8_t *in_text = (volatile uint8_t *)(uintptr_t)code + 256;

    puts("attacking");
    attack(info->cmdline, (uint8_t *)in_text);
    for (int i = 0; i < 512; i++)
        if (in_text[i] != 0x90) {
            EXPECT(!"the code has changed");
            break;
        }
    EXPECT(*(volatile const uint8_t *)constants == 0x90);
    return verdict();
}
