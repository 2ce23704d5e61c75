/*
 * CPU exceptions: each one is printed, and ends the guest.
 * The rule: every handler runs on a stack of its own (IST), so that a guest that has smashed its
 * stack can still be reported; and nothing returns from here.
 */
#include "runtime.h"

/* The tender's GDT has the same code and data segments at the same places, so no segment is
 * reloaded. */
enum { SELECTOR_CODE = 0x08, SELECTOR_TASK = 0x18 };
enum { EXCEPTIONS = 32, STUB_BYTES = 16, STACK_BYTES = 4096 };
enum { VECTOR_NMI = 2, VECTOR_DOUBLE_FAULT = 8, VECTOR_PAGE_FAULT = 14, VECTOR_MACHINE_CHECK = 18 };

struct gate {
    uint16_t offset_0;
    uint16_t selector;
    uint8_t ist;
    uint8_t type;
    uint16_t offset_16;
    uint32_t offset_32;
    uint32_t reserved;
};

struct task_state {
    uint32_t reserved0;
    uint64_t rsp[3];
    uint64_t reserved1;
    uint64_t ist[7]; /* ist[0] is IST 1 */
    uint64_t reserved2;
    uint16_t reserved3;
    uint16_t io_map;
} __attribute__((packed));

struct trap_frame {
    uint64_t rbx, rcx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t vector, error_code;
    uint64_t rip, cs, rflags, rsp, ss;
};

union cookie { /* the tender reads all of its size, whatever is in it */
    struct hvt_x86_trap trap;
    uint8_t bytes[HVT_HALT_COOKIE_SIZE];
};

extern const char hvt_trap_stubs[];
_Noreturn void hvt_trap(const struct trap_frame *frame);

static uint64_t gdt[5] = {
    0,
    0x00af99000000ffff, /* code: 64-bit, ring 0 */
    0x00cf93000000ffff, /* data */
    0,
    0, /* the task's segment, whose address is known at run time only */
};
static struct gate idt[EXCEPTIONS];
static struct task_state task;
static uint8_t stacks[2][STACK_BYTES] __attribute__((aligned(16)));
static union cookie cookie;

/* What can strike while another exception is being reported must not reuse its stack. */
static uint8_t ist_of(unsigned vector)
{
    bool any_time =
        vector == VECTOR_NMI || vector == VECTOR_DOUBLE_FAULT || vector == VECTOR_MACHINE_CHECK;
    return any_time ? 2 : 1;
}

static void fill_idt(void)
{
    for (unsigned i = 0; i < EXCEPTIONS; i++) {
        uint64_t stub = (uintptr_t)hvt_trap_stubs + i * STUB_BYTES;
        idt[i] = (struct gate){
            .offset_0 = (uint16_t)stub,
            .offset_16 = (uint16_t)(stub >> 16),
            .offset_32 = (uint32_t)(stub >> 32),
            .selector = SELECTOR_CODE,
            .ist = ist_of(i),
            .type = 0x8e, /* present, interrupt gate */
        };
    }
}

static void fill_task(void)
{
    uint64_t at = (uintptr_t)&task;

    task.ist[0] = (uintptr_t)stacks[0] + STACK_BYTES;
    task.ist[1] = (uintptr_t)stacks[1] + STACK_BYTES;
    task.io_map = sizeof task;
    gdt[3] =
        (sizeof task - 1) | (at & 0xffffff) << 16 | UINT64_C(0x89) << 40 | (at >> 24 & 0xff) << 56;
    gdt[4] = at >> 32;
}

void hvt_cpu_init(void)
{
    const struct cpu_table gdt_at = {sizeof gdt - 1, (uintptr_t)gdt};
    const struct cpu_table idt_at = {sizeof idt - 1, (uintptr_t)idt};

    fill_task();
    fill_idt();
    cpu_load_gdt(&gdt_at);
    cpu_load_task(SELECTOR_TASK);
    cpu_load_idt(&idt_at);
}

static const char *name_of(uint64_t vector)
{
    static const char names[EXCEPTIONS][4] = {
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9",   "#TS",
        "#NP", "#SS", "#GP", "#PF", "15",  "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
        "22",  "23",  "24",  "25",  "26",  "27",  "#HV", "#VC", "#SX", "31"};
    return names[vector % EXCEPTIONS];
}

static void print_trap(const struct trap_frame *frame, uint64_t cr2)
{
    hvt_log("Solo5: trap %s: error=0x%lx rip=0x%lx rsp=0x%lx rflags=0x%lx", name_of(frame->vector),
            frame->error_code, frame->rip, frame->rsp, frame->rflags);
    if (frame->vector == VECTOR_PAGE_FAULT)
        hvt_log(" cr2=0x%lx", cr2);
    hvt_log("\nSolo5: ABORT: unhandled CPU exception %s\n", name_of(frame->vector));
}

/* HALT with the registers of the exception, which the tender puts into the core file. The cookie has
 * no room for them. RAX and RDX make the hypercall, so these two are lost. */
static _Noreturn void halt(const struct trap_frame *frame)
{
    static struct hvt_halt block = {.exit_status = SOLO5_EXIT_ABORT};

    block.cookie_gpa = (uintptr_t)&cookie;
    __asm__ volatile("movq %0, %%rsp\n\t"
                     "popq %%rbx\n\tpopq %%rcx\n\tpopq %%rsi\n\tpopq %%rdi\n\tpopq %%rbp\n\t"
                     "popq %%r8\n\tpopq %%r9\n\tpopq %%r10\n\tpopq %%r11\n\t"
                     "popq %%r12\n\tpopq %%r13\n\tpopq %%r14\n\tpopq %%r15\n\t"
                     "outl %%eax, %%dx\n\t"
                     "ud2"
                     :
                     : "D"(frame), "a"((uint32_t)(uintptr_t)&block),
                       "d"((uint16_t)(HVT_HYPERCALL_PIO_BASE + HVT_HYPERCALL_HALT))
                     : "memory");
    __builtin_unreachable();
}

void hvt_trap(const struct trap_frame *frame)
{
    static bool reporting;
    uint64_t cr2 = cpu_read_cr2();

    if (reporting) /* the report itself has failed: the first cookie says more than the second */
        halt(frame);
    reporting = true;
    cookie.trap = (struct hvt_x86_trap){
        .cr2 = cr2,
        .error_code = frame->error_code,
        .rip = frame->rip,
        .cs = frame->cs,
        .rflags = frame->rflags,
        .rsp = frame->rsp,
        .ss = frame->ss,
    };
    print_trap(frame, cr2);
    halt(frame);
}
