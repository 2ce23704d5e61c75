/* Thread-local storage: two blocks, of which each keeps its own values. */
#include "check.h"

/* Volatile, or a compiler may see through them and leave no template. */
static _Thread_local volatile uint64_t initialised = 0x1122334455667788;
static _Thread_local volatile uint8_t odd = 0x99;
static _Thread_local volatile uint64_t zero;
static _Thread_local volatile uint8_t aligned[64] __attribute__((aligned(64)));

static uintptr_t make_block(uintptr_t at)
{
    EXPECT(solo5_tls_init(at) == SOLO5_R_OK);
    return solo5_tls_tp_offset(at);
}

/* No function looks at a variable both before and after a block is set: a compiler may take it that
 * the thread of a function stays the same. */
__attribute__((noinline)) static void check_fresh(void)
{
    EXPECT(initialised == 0x1122334455667788);
    EXPECT(odd == 0x99);
    EXPECT(zero == 0);
    EXPECT((uintptr_t)aligned % 64 == 0);
    EXPECT(aligned[0] == 0 && aligned[63] == 0);
}

__attribute__((noinline)) static void check_kept(uint64_t first, uint64_t second)
{
    EXPECT(initialised == first && zero == second);
}

__attribute__((noinline)) static void keep(uint64_t first, uint64_t second)
{
    initialised = first;
    zero = second;
}

__attribute__((noinline)) static void use(uintptr_t thread)
{
    EXPECT(solo5_set_tls_base(thread) == SOLO5_R_OK);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    size_t size = solo5_tls_size();
    memset((void *)info->heap_start, 0xa5, 3 * size + 8); /* so that init has something to clear */
    uintptr_t first = make_block(info->heap_start + 1);   /* any address will do */
    uintptr_t second = make_block(info->heap_start + 1 + size);

    use(first);
    check_fresh();
    keep(1, 2);
    use(second);
    check_fresh();
    keep(3, 4);
    use(first);
    check_kept(1, 2);
    use(second);
    check_kept(3, 4);
    /* Nothing beyond the size that was told. */
    EXPECT(*(uint8_t *)(info->heap_start + 1 + 2 * size) == 0xa5);
    EXPECT(solo5_set_tls_base(UINT64_C(1) << 62) == SOLO5_R_EINVAL);
    return verdict();
}
