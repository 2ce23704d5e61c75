/*
 * What CPUID promises a guest, once each, and RDRAND and RDSEED in all sizes, more often than a
 * tender can have numbers in store. All of it must work inside the tender's sandbox.
 * With the word "numbers" it prints what they gave.
 */
#include "check.h"

#if defined(__x86_64__)

enum { ARITHMETIC_FLAGS = 0x8d5, CF = 1, ROUNDS = 100 };

static uint8_t area[512] __attribute__((aligned(64)));

#define DO(text)                                                                                   \
    __asm__ volatile(text : : "S"(area) : "rax", "rbx", "rcx", "rdx", "rdi", "memory", "cc")

static void do_all(void)
{
    DO("xorl %%eax, %%eax\n\tcpuid");
    DO("rdtsc");
    DO("rdtscp");
    DO("movl $0xc0000100, %%ecx\n\trdmsr\n\twrmsr");
    DO("movl $0x277, %%ecx\n\trdmsr\n\twrmsr");
    DO("sgdt (%%rsi)\n\tsidt (%%rsi)\n\tstr %%ax\n\tsldt %%ax\n\tsmsw %%ax");
    DO("movq %%cr0, %%rax\n\tmovq %%rax, %%cr0\n\tmovq %%cr3, %%rax\n\tmovq %%rax, %%cr3");
    DO("invlpg (%%rsi)\n\twbinvd\n\tclts\n\tpause\n\tlfence\n\tsfence\n\tmfence");
    DO("clflush (%%rsi)\n\tprefetchnta (%%rsi)\n\tcli");
    DO("fninit\n\tfld1\n\tfsin\n\tfstp %%st(0)\n\tfxsave (%%rsi)\n\tfxrstor (%%rsi)");
    DO("stmxcsr (%%rsi)\n\tldmxcsr (%%rsi)\n\tpaddb %%mm0, %%mm0\n\temms");
    DO("addsd %%xmm0, %%xmm0\n\thaddps %%xmm0, %%xmm0\n\tpabsb %%xmm0, %%xmm0");
    DO("ptest %%xmm0, %%xmm0\n\taesenc %%xmm0, %%xmm0\n\tpclmulqdq $0, %%xmm0, %%xmm0");
    DO("crc32l %%eax, %%eax\n\tpopcnt %%eax, %%eax\n\tlzcnt %%eax, %%eax\n\ttzcnt %%eax, %%eax");
    DO("movbe (%%rsi), %%eax\n\tandn %%eax, %%eax, %%eax\n\tshlx %%eax, %%eax, %%eax");
    DO("cmpxchg8b (%%rsi)\n\tlock cmpxchg16b (%%rsi)\n\tlahf\n\tsahf\n\tcld");
}

/* One number; 0 where the flags are not those of a success. */
#define NUMBER(name, instruction, register)                                                        \
    static uint64_t name(void)                                                                     \
    {                                                                                              \
        uint64_t value = 0, flags;                                                                 \
        __asm__ volatile("cmpl %%eax, %%eax\n\t" instruction " %" register                         \
                         "0\n\tpushfq\n\tpopq %1"                                                  \
                         : "+r"(value), "=r"(flags)                                                \
                         :                                                                         \
                         : "cc");                                                                  \
        return (flags & ARITHMETIC_FLAGS) == CF ? value : 0;                                       \
    }

NUMBER(rdrand64, "rdrand", "q")
NUMBER(rdrand32, "rdrand", "k")
NUMBER(rdrand16, "rdrand", "w")
NUMBER(rdseed64, "rdseed", "q")
NUMBER(rdseed32, "rdseed", "k")
NUMBER(rdseed16, "rdseed", "w")

int solo5_app_main(const struct solo5_start_info *info)
{
    uint64_t all[6] = {0};

    do_all();
    for (int round = 0; round < ROUNDS; round++) {
        const uint64_t found[6] = {rdrand64(), rdrand32(), rdrand16(),
                                   rdseed64(), rdseed32(), rdseed16()};
        for (int i = 0; i < 6; i++)
            all[i] |= found[i];
        if (is_word(info->cmdline, "numbers"))
            printf("%lx %lx %lx %lx %lx %lx\n", found[0], found[1], found[2], found[3], found[4],
                   found[5]);
    }
    for (int i = 0; i < 6; i += 3) {
        EXPECT(all[i] == UINT64_MAX);
        EXPECT(all[i + 1] == UINT32_MAX);
        EXPECT(all[i + 2] == UINT16_MAX);
    }
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
