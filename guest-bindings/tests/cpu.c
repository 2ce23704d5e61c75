/*
 * What this guest sees of its CPU, as the command line says:
 *   cpuid                each leaf: "cpuid LEAF SUBLEAF EAX EBX ECX EDX" in hex
 *   msrs FIRST COUNT ... which of these MSRs can be read, and which of them can be written with what
 *                        they hold: "msr NUMBER r" or "msr NUMBER rw"
 *   rdmsr NUMBER         one of them, without a handler of its own: the trap is reported
 *   own                  the MSRs that are the guest's do what they are for
 */
#include "check.h"

#if defined(__x86_64__)

enum { MSR_TSC = 0x10, MSR_FS_BASE = 0xc0000100, MSR_KERNEL_GS_BASE = 0xc0000102 };
enum { VECTOR_GP = 13, SELECTOR_CODE = 8, INTERRUPT_GATE = 0x8e00 };

static uint64_t read_msr(uint32_t number)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number) : "memory");
    return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t number, uint64_t value)
{
    uint32_t low = (uint32_t)value, high = (uint32_t)(value >> 32);
    __asm__ volatile("wrmsr" : : "c"(number), "a"(low), "d"(high) : "memory");
}

/* CPUID. */

struct leaf {
    uint32_t eax, ebx, ecx, edx;
};

static struct leaf read_leaf(uint32_t number, uint32_t subleaf)
{
    struct leaf leaf;
    __asm__ volatile("cpuid"
                     : "=a"(leaf.eax), "=b"(leaf.ebx), "=c"(leaf.ecx), "=d"(leaf.edx)
                     : "a"(number), "c"(subleaf));
    return leaf;
}

static void print_leaf(uint32_t number, uint32_t subleaf)
{
    struct leaf leaf = read_leaf(number, subleaf);
    printf("cpuid %x %x %x %x %x %x\n", number, subleaf, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx);
}

static void print_cpuid(void)
{
    static const uint32_t first[] = {0, 0x40000000, 0x80000000};

    for (size_t range = 0; range < sizeof first / sizeof first[0]; range++) {
        uint32_t last = read_leaf(first[range], 0).eax;
        for (uint32_t number = first[range]; number <= last; number++)
            for (uint32_t subleaf = 0; subleaf < (number == 0xd ? 20 : 3); subleaf++)
                print_leaf(number, subleaf);
    }
}

/* MSRs, with a #GP handler that goes on behind the instruction, which is 2 bytes long. */

struct gate {
    uint16_t offset_0, selector, type, offset_16;
    uint32_t offset_32, reserved;
};

extern const char skip_instruction[];
uint32_t refused; /* by the CPU, so far */

__asm__(".text\n"
        "skip_instruction:\n"
        "    incl refused(%rip)\n"
        "    addq $8, %rsp\n" /* the error code */
        "    addq $2, (%rsp)\n"
        "    iretq\n");

static void go_on_after_gp(void)
{
    static struct gate gates[VECTOR_GP + 1];
    const struct {
        uint16_t limit;
        struct gate *gates;
    } __attribute__((packed)) idt = {sizeof gates - 1, gates};
    uint64_t handler = (uintptr_t)skip_instruction;

    gates[VECTOR_GP] = (struct gate){
        .offset_0 = (uint16_t)handler,
        .selector = SELECTOR_CODE,
        .type = INTERRUPT_GATE,
        .offset_16 = (uint16_t)(handler >> 16),
        .offset_32 = (uint32_t)(handler >> 32),
    };
    __asm__ volatile("lidt %0" : : "m"(idt), "m"(gates));
}

static void try_msr(uint32_t number)
{
    uint32_t before = refused;
    uint64_t value = read_msr(number);

    bool can_read = refused == before;
    before = refused;
    write_msr(number, can_read ? value : 0);
    bool can_write = refused == before;
    if (can_read || can_write)
        printf("msr %x %s%s\n", number, can_read ? "r" : "", can_write ? "w" : "");
}

/* The MSRs that are the guest's. */

static void use_own(void)
{
    uint64_t fs_base = read_msr(MSR_FS_BASE);
    uint64_t copy[3] = {0, 0, 0x5678};
    write_msr(MSR_FS_BASE, (uintptr_t)&copy[1]);
    uint64_t there;
    __asm__ volatile("movq %%fs:8, %0" : "=r"(there));
    write_msr(MSR_FS_BASE, fs_base);
    EXPECT(there == 0x5678);

    write_msr(MSR_KERNEL_GS_BASE, (uintptr_t)&copy[1]);
    __asm__ volatile("swapgs\n\tmovq %%gs:8, %0\n\tswapgs" : "=r"(there));
    EXPECT(there == 0x5678);

    /*
     * It counts. That it never goes back is the KVM's: one in an emulated machine with several CPUs has
     * been seen to stay behind a first reading for 1,000 more.
     */
    uint64_t tsc = read_msr(MSR_TSC);
    while (read_msr(MSR_TSC) == tsc)
        continue;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *how = info->cmdline;

    if (is_word(how, "cpuid")) {
        print_cpuid();
    } else if (is_word(how, "msrs")) {
        go_on_after_gp();
        for (unsigned at = 1; *word_at(how, at) != '\0'; at += 2) {
            uint32_t first = (uint32_t)number_at(word_at(how, at), 0);
            uint32_t count = (uint32_t)number_at(word_at(how, at + 1), 0);
            for (uint32_t number = first; number - first < count; number++)
                try_msr(number);
        }
        printf("refused %u\n", refused);
    } else if (is_word(how, "rdmsr")) {
        read_msr((uint32_t)number_at(word_at(how, 1), 0));
        return survived();
    } else {
        use_own();
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
