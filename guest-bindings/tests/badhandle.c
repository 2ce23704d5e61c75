/* Uses handles that name nothing, or a device of the other kind: each call must come back with
 * EINVAL. */
#include "check.h"
#include "raw.h"

/* The manifest's order. */
enum { STORAGE = 1, SERVICE = 2 };

static uint8_t buffer[4096];

static void check_block(uint64_t handle)
{
    EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_READ, handle, 0, buffer, 512) == HVT_R_EINVAL);
    EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_WRITE, handle, 0, buffer, 512) == HVT_R_EINVAL);
}

static void check_net(uint64_t handle)
{
    EXPECT(raw_net_io(HVT_HYPERCALL_NET_READ, handle, buffer, sizeof buffer) == HVT_R_EINVAL);
    EXPECT(raw_net_io(HVT_HYPERCALL_NET_WRITE, handle, buffer, 60) == HVT_R_EINVAL);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const uint64_t two_to_32 = UINT64_C(1) << 32, two_to_63 = UINT64_C(1) << 63;
    const uint64_t nobody[] = {0, 3, 63, 64, 65, two_to_32, two_to_32 + STORAGE, two_to_63, -1};

    (void)info;
    for (size_t i = 0; i < sizeof nobody / sizeof nobody[0]; i++) {
        printf("handle 0x%lx\n", nobody[i]);
        check_block(nobody[i]);
        check_net(nobody[i]);
    }
    check_block(SERVICE);
    check_net(STORAGE);
    return verdict();
}
