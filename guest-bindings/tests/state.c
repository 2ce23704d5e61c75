/*
 * Registers keep their values over a hypercall, at which a test takes the guest to another CPU. The
 * command line says which: general, sse, avx, avx512, msrs, debug. With tsc, a test has set that to
 * 2^60.
 */
#include "check.h"
#include "raw.h"

#if defined(__x86_64__)

static struct hvt_walltime walltime;
static uint64_t general[14];
static uint8_t vectors[16][32];
static uint8_t wide_vectors[32][64];
static uint16_t mask;
static struct {
    uint16_t control;
    uint16_t reserved[13];
} x87;
static uint32_t mxcsr;
static uint64_t top;

/* For OUT: what it is made with, in RDX and RAX. */
#define CALL "out %%eax, %%dx\n"
#define PORT HVT_HYPERCALL_PIO_BASE + HVT_HYPERCALL_WALLTIME
#define ARGUMENT (uint32_t)(uintptr_t)&walltime

static void keep_general(void)
{
    __asm__ volatile("push %%rbx; push %%rbp\n"
                     "mov $1, %%ebx; mov $2, %%ecx; mov $3, %%esi; mov $4, %%edi; mov $-5, %%rbp\n"
                     "mov $8, %%r8d; mov $9, %%r9d; mov $10, %%r10d; mov $11, %%r11d\n"
                     "movabs $0xcccccccccccccccc, %%r12; mov $13, %%r13d; mov $14, %%r14d\n"
                     "mov $15, %%r15d; std; stc\n" CALL
                     "pushf; cld\n"
                     "mov %%rbx, general; mov %%rcx, general + 8; mov %%rsi, general + 16\n"
                     "mov %%rdi, general + 24; mov %%rbp, general + 32; mov %%r8, general + 40\n"
                     "mov %%r9, general + 48; mov %%r10, general + 56; mov %%r11, general + 64\n"
                     "mov %%r12, general + 72; mov %%r13, general + 80; mov %%r14, general + 88\n"
                     "mov %%r15, general + 96; pop general + 104; pop %%rbp; pop %%rbx\n"
                     :
                     : "d"(PORT), "a"(ARGUMENT)
                     : "rcx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
                       "memory", "cc");
    static const uint64_t expected[] = {1, 2,  3,  4,  -5ull, 8, 9, 10, 11, 0xcccccccccccccccc,
                                        13, 14, 15};
    EXPECT(memcmp(general, expected, sizeof expected) == 0);
    EXPECT((general[13] & 0x401) == 0x401); /* DF, CF */
}

static void fill_vectors(void)
{
    for (unsigned i = 0; i < sizeof vectors; i++)
        ((uint8_t *)vectors)[i] = (uint8_t)(i * 7 + 1);
}

static void check_vectors(unsigned size)
{
    for (unsigned i = 0; i < 16; i++)
        for (unsigned j = 0; j < size; j++)
            EXPECT(vectors[i][j] == (uint8_t)((i * 32 + j) * 7 + 1));
}

#define EACH(move) \
    move("0") move("1") move("2") move("3") move("4") move("5") move("6") move("7") move("8") \
    move("9") move("10") move("11") move("12") move("13") move("14") move("15")
#define LOAD_XMM(n) "movdqu vectors + 32 * " n ", %%xmm" n "\n"
#define STORE_XMM(n) "movdqu %%xmm" n ", vectors + 32 * " n "\n"
#define LOAD_YMM(n) "vmovdqu vectors + 32 * " n ", %%ymm" n "\n"
#define STORE_YMM(n) "vmovdqu %%ymm" n ", vectors + 32 * " n "\n"

static void keep_sse(void)
{
    const uint16_t control = 0x0f7f; /* round to zero */
    uint32_t rounding = 0x7f80; /* the same */
    uint32_t a = 0x80000001, b, c = 0, d;

    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (c & 1u << 7) /* AMD's misaligned SSE */
        rounding |= 1u << 17;

    fill_vectors();
    __asm__ volatile("fldcw %[control]; ldmxcsr %[rounding]; fldpi; fld1\n" EACH(LOAD_XMM) CALL
                     : : "d"(PORT), "a"(ARGUMENT), [control] "m"(control), [rounding] "m"(rounding)
                     : "memory");
    memset(vectors, 0, sizeof vectors);
    __asm__ volatile(EACH(STORE_XMM) "faddp; fistpll %0; fnstcw %1; stmxcsr %2; fninit\n"
                     : "=m"(top), "=m"(x87.control), "=m"(mxcsr) : : "memory");
    check_vectors(16);
    EXPECT(top == 4 && x87.control == control && (mxcsr & ~0x3fu) == rounding);
}

static void keep_avx(void)
{
    fill_vectors();
    __asm__ volatile(EACH(LOAD_YMM) CALL : : "d"(PORT), "a"(ARGUMENT) : "memory");
    memset(vectors, 0, sizeof vectors);
    __asm__ volatile(EACH(STORE_YMM) : : : "memory");
    check_vectors(32);
}

#define LOAD_ZMM(n) "vmovdqu64 wide_vectors + 64 * " n ", %%zmm" n "\n"
#define STORE_ZMM(n) "vmovdqu64 %%zmm" n ", wide_vectors + 64 * " n "\n"
#define SECOND_HALF(move) \
    move("16") move("17") move("18") move("19") move("20") move("21") move("22") move("23") \
    move("24") move("25") move("26") move("27") move("28") move("29") move("30") move("31")

static void keep_avx512(void)
{
    for (unsigned i = 0; i < sizeof wide_vectors; i++)
        ((uint8_t *)wide_vectors)[i] = (uint8_t)(i * 7 + i / 256);
    mask = 0x1234;
    __asm__ volatile("kmovw mask, %%k5\n" EACH(LOAD_ZMM) SECOND_HALF(LOAD_ZMM) CALL
                     : : "d"(PORT), "a"(ARGUMENT) : "memory");
    memset(wide_vectors, 0, sizeof wide_vectors);
    mask = 0;
    __asm__ volatile(EACH(STORE_ZMM) SECOND_HALF(STORE_ZMM) "kmovw %%k5, mask" : : : "memory");
    for (unsigned i = 0; i < sizeof wide_vectors; i++)
        EXPECT(((uint8_t *)wide_vectors)[i] == (uint8_t)(i * 7 + i / 256));
    EXPECT(mask == 0x1234);
}

static uint64_t read_msr(uint32_t number)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number) : "memory");
    return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t number, uint64_t value)
{
    __asm__ volatile("wrmsr" : : "c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory");
}

static void keep_msrs(void)
{
    static const uint32_t numbers[] = {0x174, 0x176, 0xc0000081, 0xc0000082, 0xc0000084, 0xc0000101,
                                       0xc0000102};
    for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
        write_msr(numbers[i], 0x1230 + i);
    raw_write32(PORT, ARGUMENT);
    for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
        EXPECT(read_msr(numbers[i]) == 0x1230 + i);
}

static void keep_debug(void)
{
    uint64_t value;
    __asm__ volatile("mov %0, %%db1" : : "r"(UINT64_C(0x123456)));
    raw_write32(PORT, ARGUMENT);
    __asm__ volatile("mov %%db1, %0" : "=r"(value));
    EXPECT(value == 0x123456);
}

static void read_tsc(void)
{
    uint32_t low, high, number = 1;
    uint64_t last = UINT64_C(1) << 60;
    for (unsigned i = 0; i < 30; i++) {
        uint64_t now;
        if (i % 3 == 0) {
            __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
            now = (uint64_t)high << 32 | low;
        } else if (i % 3 == 1) {
            write_msr(0xc0000103, 5);
            __asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(number));
            now = (uint64_t)high << 32 | low;
            EXPECT(number == 5);
        } else {
            now = read_msr(0x10);
        }
        EXPECT(now >= last);
        last = now;
    }
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *word;
    for (unsigned index = 0; *(word = word_at(info->cmdline, index)) != '\0'; index++) {
        if (is_word(word, "general"))
            keep_general();
        else if (is_word(word, "sse"))
            keep_sse();
        else if (is_word(word, "avx"))
            keep_avx();
        else if (is_word(word, "avx512"))
            keep_avx512();
        else if (is_word(word, "msrs"))
            keep_msrs();
        else if (is_word(word, "debug"))
            keep_debug();
        else if (is_word(word, "tsc"))
            read_tsc();
    }
    return verdict();
}

#else

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    return verdict();
}

#endif
