/*
 * The core file of an spt guest, by tender/observe/core.py's header with the registers put in.
 *
 * The rule here: the guest can have changed the plan. What is written is the guest's own.
 */
#include "code.h"

/* In the order of struct user_regs_struct (asm/user_64.h). */
static void put_registers(uint64_t *to, const struct sigcontext *cpu)
{
    const uint64_t values[] = {
        cpu->r15, cpu->r14, cpu->r13, cpu->r12, cpu->rbp, cpu->rbx, cpu->r11,     cpu->r10,
        cpu->r9,  cpu->r8,  cpu->rax, cpu->rcx, cpu->rdx, cpu->rsi, cpu->rdi,     ~0ul,
        cpu->rip, cpu->cs,  cpu->eflags, cpu->rsp, cpu->ss,
    };
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++)
        to[i] = values[i];
}

static int is_readable(const struct spt_plan *plan, uint64_t page)
{
    for (uint32_t i = 0; i < plan->range_count; i++) {
        const struct spt_range *range = &plan->ranges[i];
        if (range->start <= page && page < range->end)
            return range->prot & 1; /* PROT_READ */
    }
    return 1;
}

static int is_zero(uint64_t page)
{
    const uint64_t *words = (const uint64_t *)page;
    for (unsigned i = 0; i < PAGE / sizeof *words; i++)
        if (words[i])
            return 0;
    return 1;
}

static long write_all(int fd, uint64_t from, uint64_t size, uint64_t offset)
{
    while (size) {
        long count = call(__NR_pwrite64, fd, (long)from, (long)size, (long)offset, 0);
        if (count <= 0)
            return count ? count : -5; /* EIO */
        from += (uint64_t)count;
        offset += (uint64_t)count;
        size -= (uint64_t)count;
    }
    return 0;
}

static long write_core(const struct spt_plan *plan, const struct sigcontext *cpu)
{
    uint64_t *registers = (uint64_t *)(plan->core_header + plan->core_registers);
    long error = call(__NR_ftruncate, plan->core_fd, (long)(PAGE + plan->mem_size), 0, 0, 0);

    put_registers(registers, cpu);
    if (!error)
        error = write_all(plan->core_fd, plan->core_header, PAGE, 0);
    for (uint64_t page = 0x10000; page < plan->mem_size && !error; page += PAGE)
        if (is_readable(plan, page) && !is_zero(page))
            error = write_all(plan->core_fd, page, PAGE, PAGE + page);
    return error;
}

void core_dump(const struct spt_plan *plan, const struct sigcontext *cpu, char name[CORE_NAME_MAX])
{
    struct message message;
    char answer[CORE_NAME_MAX];
    long error, count = 0;

    name[0] = 0;
    if (!plan->has_core)
        return;
    error = write_core(plan, cpu);
    if (!error) {
        call(__NR_write, plan->core_helper_fd, (long)"n", 1, 0, 0);
        count = call(__NR_read, plan->core_helper_fd, (long)answer, sizeof answer - 1, 0, 0);
        error = count < 1 ? -5 : -(long)(uint8_t)answer[0];
    }
    message_begin(plan, &message);
    if (plan->is_report) { /* embed/protocol.py: the name, or nothing */
        message.text[1] = 'D', message.text[2] = 'M', message.text[3] = 'P';
    } else {
        message_put(&message, error ? "dumpcore: errno " : "dumpcore: dumped guest core to: ");
        if (error)
            message_put_number(&message, (uint64_t)-error, 10);
    }
    if (!error) {
        answer[count] = 0;
        message_put(&message, answer + 1);
        for (long i = 0; i < count; i++)
            name[i] = answer[i + 1];
    }
    message_send(plan, &message);
}
