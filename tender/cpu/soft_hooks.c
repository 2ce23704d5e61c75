/* What the emulator calls back for: soft.h has what the hooks are. */
#include "soft_private.h"

static void soft_on_out(void *emulator, uint32_t port, int size, uint32_t value, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = port;
    soft->size = (uint32_t)size;
    soft->value = value;
    soft_leave(soft, SOFT_OUT);
    if (soft->own->stale) {
        soft->again = true;
        uc.emu_stop(emulator);
    }
}

static uint32_t soft_on_in(void *emulator, uint32_t port, int size, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = port;
    soft->size = (uint32_t)size;
    soft->reply = 0;
    soft_leave(soft, SOFT_IN);
    return (uint32_t)soft->reply;
}

void soft_on_intr(void *emulator, uint32_t number, void *data)
{
    struct soft *soft = data;
    soft->number = number;
    soft_leave(soft, SOFT_INTR);
    if (soft->again)
        uc.emu_stop(emulator);
}

bool soft_on_invalid(void *emulator, void *data)
{
    (void)emulator;
    soft_leave(data, SOFT_INVALID);
    return true; /* who runs on has made an exception of it */
}

bool soft_on_memory(void *emulator, int type, uint64_t address, int size, int64_t value,
                           void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = (uint32_t)type;
    soft->address = address;
    soft->size = (uint32_t)size;
    soft->value = (uint64_t)value;
    soft->is_write = type == UC_MEM_WRITE_UNMAPPED || type == UC_MEM_WRITE_PROT;
    soft_leave(soft, SOFT_MEMORY);
    return false;
}

static void soft_on_count(void *emulator, uint64_t address, uint32_t size, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    (void)address;
    (void)size;
    if (!soft->instructions)
        soft_leave(soft, SOFT_LIMIT);
    else
        soft->instructions--;
}

/* RDTSC and RDTSCP are answered here: a guest reads its clock more often than anything else. */
#define SOFT_REG_RAX 35
#define SOFT_REG_RCX 38
#define SOFT_REG_RDX 40
#define SOFT_REG_MSR 248
#define SOFT_TSC_AUX 0xc0000103

static int soft_on_rdtsc(void *emulator, void *data)
{
    struct soft *soft = data;
    uint64_t counter = soft_counter(soft->clock);
    uint64_t low = (uint32_t)counter, high = counter >> 32;

    uc.reg_write(emulator, SOFT_REG_RAX, &low);
    uc.reg_write(emulator, SOFT_REG_RDX, &high);
    return 1;
}

static int soft_on_rdtscp(void *emulator, void *data)
{
    struct uc_x86_msr aux = {.rid = SOFT_TSC_AUX};

    uc.reg_read(emulator, SOFT_REG_MSR, &aux);
    uc.reg_write(emulator, SOFT_REG_RCX, &aux.value);
    return soft_on_rdtsc(emulator, data);
}

/* MRS of a counter (CNTPCT_EL0, CNTVCT_EL0) likewise. */
static uint32_t soft_on_mrs(void *emulator, int to, const struct uc_arm64_cp_reg *from, void *data)
{
    struct soft *soft = data;
    bool timer = from->op0 == 3 && from->op1 == 3 && from->crn == 14 && from->crm == 0;

    if (!timer || (from->op2 != 1 && from->op2 != 2))
        return 0;
    uint64_t counter = soft_counter(soft->clock);
    uc.reg_write(emulator, to, &counter);
    return 1;
}

static int soft_on_insn(void *emulator, void *data)
{
    struct soft_insn *insn = data;
    (void)emulator;
    insn->soft->number = insn->number;
    insn->soft->reply = 0;
    soft_leave(insn->soft, SOFT_INSN);
    return (int)insn->soft->reply;
}

int soft_hook_insn(struct soft *soft, struct soft_insn *insn, int number)
{
    insn->soft = soft;
    insn->number = (uint32_t)number;
    return soft_hook(soft, UC_HOOK_INSN, soft_on_insn, insn, 1, 0, number);
}

int soft_count(struct soft *soft, uint64_t instructions)
{
    soft->instructions = instructions;
    return soft_hook_all(soft, UC_HOOK_CODE, soft_on_count);
}

int soft_hook_x86(struct soft *soft, int out, int in, int rdtsc, int rdtscp)
{
    int error = soft_hook(soft, UC_HOOK_INSN, soft_on_out, soft, 1, 0, out);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_in, soft, 1, 0, in);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_rdtsc, soft, 1, 0, rdtsc);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_rdtscp, soft, 1, 0, rdtscp);
    return error;
}

int soft_hook_arm64(struct soft *soft, int mrs)
{
    return soft_hook(soft, UC_HOOK_INSN, soft_on_mrs, soft, 1, 0, mrs);
}
