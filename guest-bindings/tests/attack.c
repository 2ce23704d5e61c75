/*
 * Attacks the process that runs it on the native CPU, with numbers that look random. The command
 * line is HOW SEED COUNT:
 *   calls    each system call that Linux may have, from 64-bit and 32-bit entries: none is made
 *   jump     into the program that runs the guest, at any byte of it
 *   return   by rt_sigreturn, from frames with any flags, segments, stacks and signal masks
 *   stack    exceptions with any stack pointer, FS and GS base, and flags
 *   shared   exceptions after any change of what the process shares with the tender
 * An exception ends an attack, and the next one follows. SUCCESS: all of them were made.
 */
#include "check.h"

#if defined(__x86_64__)
#include "../../tender/cpu/native.h"

enum { VECTORS = 32, SELECTOR_CODE = 8, INTERRUPT_GATE = 0x8e00, MSR_FS_BASE = 0xc0000100 };
enum { SIGRETURN = 15, URETPROBE = 335, UPROBE = 336, X32 = 0x40000000, CALLS_END = 600 };
enum { GREGS = 5, FPSTATE = 28, FRAME_WORDS = 128, RSP = 15, RIP, FLAGS, SEGMENTS };

static volatile uint64_t *const shared = (uint64_t *)NATIVE_SHARED;
static uint64_t seed, frame[FRAME_WORDS];
uint64_t caught, kept_rsp; /* exceptions; the stack of attempt() */

static uint64_t next(void)
{
    uint64_t value = seed += 0x9e3779b97f4a7c15;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

/* An address that may mean something. */
static uint64_t address(void)
{
    const uint64_t near[] = {
        NATIVE_PROGRAM,     NATIVE_SHARED, NATIVE_SHARED + NATIVE_STACK,
        (uintptr_t)frame,   0x200000,      NATIVE_SHARED + NATIVE_SHARED_SIZE,
        UINT64_C(1) << 47,  0,             0x7fffffff0000,
        UINT64_MAX << 12,
    };
    return near[next() % (sizeof near / sizeof near[0])] + next() % 64 * (next() % 2 ? 8 : 1);
}

static uint64_t word(void) { return next() % 4 ? address() : next() >> next() % 64; }

/* attempt() calls a function, which may come back by any exception. */
void attempt(void (*attack)(void));
extern const char by_exception[];
__asm__(".text\n"
        "attempt:\n"
        "    pushq %rbx\n    pushq %rbp\n    pushq %r12\n"
        "    pushq %r13\n    pushq %r14\n    pushq %r15\n    subq $8, %rsp\n"
        "    movq %rsp, kept_rsp(%rip)\n"
        "    callq *%rdi\n"
        "    jmp 1f\n"
        "by_exception:\n"
        "    incq caught(%rip)\n"
        "1:  movq kept_rsp(%rip), %rsp\n"
        "    pushq $2\n    popfq\n    addq $8, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n"
        "    popq %r12\n    popq %rbp\n    popq %rbx\n    retq\n");

static void catch_exceptions(void)
{
    struct gate {
        uint16_t offset_0, selector, type, offset_16;
        uint32_t offset_32, reserved;
    };
    static struct gate gates[VECTORS];
    const struct {
        uint16_t limit;
        struct gate *gates;
    } __attribute__((packed)) idt = {sizeof gates - 1, gates};
    uint64_t handler = (uintptr_t)by_exception;

    for (unsigned i = 0; i < VECTORS; i++)
        gates[i] = (struct gate){(uint16_t)handler, SELECTOR_CODE, INTERRUPT_GATE | 1,
                                 (uint16_t)(handler >> 16), (uint32_t)(handler >> 32), 0};
    __asm__ volatile("lidt %0" : : "m"(idt), "m"(gates));
}

static void make_call(void)
{
    register uint64_t r10 __asm__("r10") = word();
    register uint64_t r8 __asm__("r8") = word();
    register uint64_t r9 __asm__("r9") = word();
    __asm__ volatile("syscall"
                     :
                     : "a"(frame[0]), "D"(frame[1]), "S"(word()), "d"(word()), "r"(r10), "r"(r8),
                       "r"(r9)
                     : "rcx", "r11", "memory");
}

static void make_call_32(void)
{
    __asm__ volatile("int $0x80"
                     :
                     : "a"(frame[0]), "b"(frame[1]), "c"(word()), "d"(word()), "S"(word()),
                       "D"(word())
                     : "memory");
}

/*
 * Left out: rt_sigreturn, which is allowed, and futex with the address of the turn; uretprobe and
 * uprobe, which Linux (6.14, 6.18) keeps from every filter and refuses itself.
 */
static bool is_filtered(uint64_t number)
{
    const uint32_t low = (uint32_t)number;
    return low != SIGRETURN && low != URETPROBE && low != UPROBE;
}

static void attack_calls(unsigned count)
{
    uint64_t made = 0;

    for (uint64_t number = 0; number < CALLS_END + count; number++) {
        frame[0] = number < CALLS_END ? number : next() >> next() % 64;
        frame[1] = number % 3 ? next() % 64 : word();
        frame[1] += frame[1] == NATIVE_SHARED;
        attempt(make_call_32);
        made++;
        if (!is_filtered(frame[0]))
            continue;
        attempt(make_call);
        frame[0] |= X32;
        attempt(make_call);
        made += 2;
    }
    EXPECT(caught == made);
}

static void jump(void)
{
    const uint64_t at = NATIVE_PROGRAM + next() % 0x3000;
    __asm__ volatile("jmpq *%0"
                     :
                     : "r"(at), "a"(word()), "b"(word()), "c"(word()), "d"(word()), "S"(word()),
                       "D"(word())
                     : "memory");
}

static void return_by_signal(void)
{
    static const uint64_t flags[] = {1 << 8,  1 << 10, 1 << 14, 1 << 16,
                                     1 << 17, 1 << 18, 1 << 21, 3 << 12};
    static const uint16_t codes[] = {0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0x23, 8};
    static const uint16_t stacks[] = {0x2b, 0x2b, 0, 0x33, 0x10, 0x7b};

    for (unsigned i = 0; i < FRAME_WORDS; i++)
        frame[i] = next() % 2 ? 0 : word();
    for (unsigned i = 0; i < 4; i++)
        frame[GREGS + FLAGS] |= flags[next() % 8];
    if (next() % 2)
        frame[GREGS + RIP] = (uintptr_t)by_exception;
    frame[GREGS + SEGMENTS] = codes[next() % 8] | (uint64_t)stacks[next() % 6] << 48;
    if (next() % 4)
        frame[FPSTATE] = 0;
    __asm__ volatile("movq %0, %%rsp\n\tsyscall\n\tud2" : : "r"(frame), "a"(SIGRETURN) : "memory");
}

static void lose_stack(void)
{
    uint64_t at = address();
    if (at - NATIVE_SHARED <= NATIVE_SHARED_SIZE && next() % 32)
        at = 0x300000; /* on the signal stack itself, most are the process's end */
    const uint64_t flags = 2 | (next() & 0x254d05); /* TF, DF, NT, RF, AC, ID */
    __asm__ volatile("wrfsbase %2\n\twrgsbase %2\n\tpushq %1\n\tpopfq\n\t"
                     "movq %0, %%rsp\n\tpushq %%rax\n\tud2"
                     :
                     : "r"(at), "r"(flags), "r"(next() >> 17)
                     : "memory");
}

/* Not the turn, nor whether the tender sleeps: a guest that forges them hangs itself. */
static void change_shared(void)
{
    for (unsigned i = 0; i < 64; i++) {
        const uint64_t at = 2 + next() % (NATIVE_SHARED_SIZE / 8 - 2);
        shared[at] = word();
    }
    __asm__ volatile("ud2");
}

int solo5_app_main(const struct solo5_start_info *info)
{
    static const struct {
        const char *name;
        void (*attack)(void);
    } attacks[] = {
        {"jump", jump},
        {"return", return_by_signal},
        {"stack", lose_stack},
        {"shared", change_shared},
    };
    const unsigned count = (unsigned)number_at(word_at(info->cmdline, 2), 1);

    seed = number_at(word_at(info->cmdline, 1), 1);
    catch_exceptions();
    if (is_word(info->cmdline, "calls"))
        attack_calls(count);
    for (unsigned i = 0; i < sizeof attacks / sizeof attacks[0]; i++)
        for (unsigned n = 0; is_word(info->cmdline, attacks[i].name) && n < count; n++)
            attempt(attacks[i].attack);
    printf("%lu exceptions\n", caught);
    return verdict();
}
#else
int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    puts("this guest is about x86_64");
    return verdict();
}
#endif
