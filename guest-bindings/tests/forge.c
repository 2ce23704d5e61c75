/*
 * Forges argument blocks and ring entries, from numbers that look random, and knows what each of
 * them is to come to. The command line:
 *   calls NAME SEED COUNT [hold]   COUNT hypercalls that a guest may make, well or badly: each must
 *                                  be answered. Then SUCCESS. With `hold`, a pause after a tenth of
 *                                  them, and at the end a sleep until a signal comes
 *   end NAME SEED NTH              the NTH block that must end this guest
 *   wild NAME SEED NTH             the NTH one by which this guest has itself overwritten: anything
 *                                  may become of it
 *   ring SEED COUNT [hold]         COUNT entries of the ring, as above
 *   ring-end SEED NTH, ring-wild SEED NTH
 *                                  the same of the ring; wild: all of it is overwritten
 * NAME is as in NAMES below. The network device should have a frame waiting, for POLL to return.
 */
#include "check.h"
#include "raw.h"

#if defined(__x86_64__)

enum { STORAGE = 1, SERVICE = 2, STACK_BYTES = 16384, BLOCK_MAX = 40 };
enum fate { ANSWERED, REFUSED, ENDED, WILD }; /* REFUSED: answered with EINVAL */

static const char *const NAMES[] = {"",           "WALLTIME",    "PUTS",      "POLL",    "BLOCK_WRITE",
                                    "BLOCK_READ", "NET_WRITE",   "NET_READ",  "HALT"};
static const uint32_t SIZES[] = {0,
                                 sizeof(struct hvt_walltime),
                                 sizeof(struct hvt_puts),
                                 sizeof(struct hvt_poll),
                                 sizeof(struct hvt_block_io),
                                 sizeof(struct hvt_block_io),
                                 sizeof(struct hvt_net_io),
                                 sizeof(struct hvt_net_io),
                                 sizeof(struct hvt_halt)};

/* Memory that this guest does without: [ground, mem). Below is itself, and what it lives by. */
extern const char hvt_text_start[], hvt_data_start[];
static uint64_t ground, mem, capacity;

/* ---- Numbers ---- */

static uint64_t seed;

static uint64_t next(void)
{
    uint64_t value = seed += 0x9e3779b97f4a7c15;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

/* Mostly something that makes sense; else an end of something, and one more or less. */
static uint64_t ADDRESSES[16], LENGTHS[16], OFFSETS[16];
static const uint64_t HANDLES[8] = {STORAGE, SERVICE, STORAGE, SERVICE,
                                    0,       3,       64,      (uint64_t)1 << 32 | SERVICE};

static void fill_tables(void)
{
    const uint64_t addresses[16] = {
        ground,           ground + 4096,  ground + 8191,   ground + 65536,
        ground + 100001,  mem / 2,        mem - 4096,      mem - 65536,
        0,                0x1000,         0x10000,         (uintptr_t)hvt_text_start,
        (uint64_t)1 << 32, (uint64_t)1 << 63, (uint64_t)0 - 4096, mem,
    };
    const uint64_t lengths[16] = {
        0,    1,    14,       60,         60,  512, 512, 1024,
        1518, 4096, capacity, 65537,      mem, (uint64_t)1 << 32, INT64_MAX, (uint64_t)0 - 1,
    };
    const uint64_t offsets[16] = {
        0,   0,       0,          512,         512,  1024,           4096,              8192,
        513, capacity / 2, capacity - 512, capacity, capacity + 512, (uint64_t)1 << 32, INT64_MAX, (uint64_t)0 - 512,
    };

    memcpy(ADDRESSES, addresses, sizeof addresses);
    memcpy(LENGTHS, lengths, sizeof lengths);
    memcpy(OFFSETS, offsets, sizeof offsets);
}

/* One of a table, by four bits; two more say whether it is one less or more, or itself. */
static uint64_t pick(const uint64_t *table, uint64_t bits)
{
    static const int8_t DELTAS[4] = {0, 0, 1, -1};
    return table[bits & 15] + (uint64_t)(int64_t)DELTAS[bits >> 4 & 3];
}

/* ---- What is allowed ---- */

static bool inside(uint64_t gpa, uint64_t len)
{
    return len <= mem && gpa <= mem - len;
}

static bool read_only(uint64_t gpa, uint64_t len)
{
    return len > 0 && gpa < (uintptr_t)hvt_data_start && gpa + len > (uintptr_t)hvt_text_start;
}

static enum fate fate_of_buffer(uint64_t gpa, uint64_t len, bool written_to)
{
    if (!inside(gpa, len) || (written_to && read_only(gpa, len)))
        return ENDED;
    return written_to && len > 0 && gpa < ground ? WILD : ANSWERED;
}

static enum fate fate_of_block_io(const struct hvt_block_io *block, bool reads)
{
    if (block->handle != STORAGE || block->offset >= capacity)
        return REFUSED;
    if (block->len > capacity - block->offset)
        return REFUSED;
    return fate_of_buffer(block->data_gpa, block->len, reads);
}

static enum fate fate_of_net_io(const struct hvt_net_io *block, bool reads)
{
    return block->handle == SERVICE ? fate_of_buffer(block->data_gpa, block->len, reads) : REFUSED;
}

static enum fate fate_of(uint32_t number, uint64_t gpa, const void *block)
{
    const struct hvt_puts *text = block;
    const struct hvt_halt *halt = block;
    bool answered = number != HVT_HYPERCALL_PUTS && number != HVT_HYPERCALL_HALT;
    enum fate fate = fate_of_buffer(gpa, SIZES[number], answered);

    if (fate != ANSWERED)
        return fate;
    switch (number) {
    case HVT_HYPERCALL_PUTS:
        return fate_of_buffer(text->data_gpa, text->len, false);
    case HVT_HYPERCALL_BLOCK_WRITE:
    case HVT_HYPERCALL_BLOCK_READ:
        return fate_of_block_io(block, number == HVT_HYPERCALL_BLOCK_READ);
    case HVT_HYPERCALL_NET_WRITE:
    case HVT_HYPERCALL_NET_READ:
        return fate_of_net_io(block, number == HVT_HYPERCALL_NET_READ);
    case HVT_HYPERCALL_HALT:
        return !halt->cookie_gpa || inside(halt->cookie_gpa, HVT_HALT_COOKIE_SIZE) ? WILD : ENDED;
    default:
        return ANSWERED;
    }
}

/* ---- Blocks ---- */

union block {
    struct hvt_walltime walltime;
    struct hvt_puts puts;
    struct hvt_poll poll;
    struct hvt_block_io block_io;
    struct hvt_net_io net_io;
    struct hvt_halt halt;
    uint8_t bytes[BLOCK_MAX];
};

/* Where a block lies: mostly anywhere in the ground, aligned or not. */
static uint32_t place(uint32_t size, uint64_t bits)
{
    switch (bits & 31) {
    case 0:
        return (uint32_t)mem - size; /* it ends where memory ends */
    case 1:
        return (uint32_t)mem - size + 1;
    case 2:
        return (uint32_t)ADDRESSES[bits >> 5 & 15];
    case 3:
        return UINT32_MAX - (uint32_t)(bits >> 5 & 63);
    case 4:
        return (uint32_t)(uintptr_t)hvt_data_start - (uint32_t)(bits >> 5 & 63);
    default:
        return (uint32_t)ground + (uint32_t)(bits >> 8) % 0x40000;
    }
}

static uint64_t data_address(uint64_t bits, uint64_t gpa, uint64_t len)
{
    switch (bits >> 6 & 15) {
    case 0:
        return gpa; /* the block itself */
    case 1:
        return gpa + (bits >> 10 & 31) - 16;
    case 2:
        return mem - len; /* it ends where memory ends, if it can */
    case 3:
        return mem - len + 1;
    default:
        return pick(ADDRESSES, bits);
    }
}

/* The fields of a block that is to lie at `gpa`. */
static void forge(uint32_t number, uint64_t gpa, union block *block)
{
    uint64_t bits = next();
    uint64_t len = pick(LENGTHS, bits), data = data_address(bits >> 8, gpa, len);
    bool good = (bits >> 18 & 3) != 0;
    uint64_t handle = HANDLES[bits >> 20 & 7];

    switch (number) {
    case HVT_HYPERCALL_PUTS:
        block->puts = (struct hvt_puts){data, len};
        break;
    case HVT_HYPERCALL_POLL:
        block->poll = (struct hvt_poll){len, bits, RAW_UNTOUCHED};
        break;
    case HVT_HYPERCALL_BLOCK_WRITE:
    case HVT_HYPERCALL_BLOCK_READ:
        block->block_io = (struct hvt_block_io){
            good ? STORAGE : handle, pick(OFFSETS, bits >> 24), data, len, RAW_UNTOUCHED};
        break;
    case HVT_HYPERCALL_NET_WRITE:
    case HVT_HYPERCALL_NET_READ:
        block->net_io =
            (struct hvt_net_io){good ? SERVICE : handle, data, len, RAW_UNTOUCHED};
        break;
    case HVT_HYPERCALL_HALT:
        block->halt = (struct hvt_halt){data, (int32_t)(bits >> 32)};
        break;
    default:
        block->walltime.nsecs = 0;
    }
}

/* A block at a place: written there where this guest may, and then what is there. */
static enum fate prepare(uint32_t number, uint32_t *gpa, union block *block)
{
    const uint32_t size = SIZES[number];

    *gpa = place(size, next());
    forge(number, *gpa, block);
    if (*gpa >= ground && inside(*gpa, size))
        memcpy((void *)(uintptr_t)*gpa, block, size);
    else if (*gpa >= (uintptr_t)hvt_text_start && inside(*gpa, size))
        memcpy(block, (const void *)(uintptr_t)*gpa, size);
    else if (*gpa < (uintptr_t)hvt_text_start)
        return inside(*gpa, size) ? WILD : ENDED;
    return fate_of(number, *gpa, block);
}

static int32_t answer_at(uint32_t number, uint32_t gpa)
{
    union block block;

    memcpy(&block, (const void *)(uintptr_t)gpa, SIZES[number]);
    switch (number) {
    case HVT_HYPERCALL_POLL:
        return block.poll.ret;
    case HVT_HYPERCALL_BLOCK_WRITE:
    case HVT_HYPERCALL_BLOCK_READ:
        return block.block_io.ret;
    case HVT_HYPERCALL_NET_WRITE:
    case HVT_HYPERCALL_NET_READ:
        return block.net_io.ret;
    default:
        return HVT_R_OK;
    }
}

static void check_answer(uint32_t number, uint32_t gpa, enum fate fate)
{
    int32_t answer = answer_at(number, gpa);
    bool well = fate == REFUSED ? answer == HVT_R_EINVAL
                                : answer >= HVT_R_OK && answer <= HVT_R_EUNSPEC;

    if (well)
        return;
    failed_expectations++;
    printf("%s at 0x%x: %d\n", NAMES[number], gpa, answer);
}

static void make_calls(uint32_t number, uint64_t count)
{
    union block block;
    uint32_t gpa;

    while (count > 0) {
        enum fate fate = prepare(number, &gpa, &block);
        if (fate != ANSWERED && fate != REFUSED)
            continue;
        raw_hypercall_at(number, gpa);
        check_answer(number, gpa, fate);
        count--;
    }
}

static void make_one(uint32_t number, enum fate wanted, uint64_t nth)
{
    union block block;
    uint32_t gpa;

    do
        nth -= prepare(number, &gpa, &block) == wanted;
    while (nth + 1 != 0);
    raw_hypercall_at(number, gpa);
}

/* ---- The ring ---- */

static struct hvt_ring *ring;
static uint32_t tail;

static enum fate forge_entry(struct hvt_ring_entry *entry)
{
    uint64_t bits = next(), len = pick(LENGTHS, bits);
    uint32_t op = (bits >> 32 & 7) == 0 ? (uint32_t)(bits >> 35) : 1 + (uint32_t)(bits >> 35 & 1);
    bool reads = op == HVT_RING_NET_READ;

    *entry = (struct hvt_ring_entry){
        .op = op,
        .handle = (bits >> 18 & 3) != 0 ? SERVICE : (uint32_t)HANDLES[bits >> 20 & 7],
        .data_gpa = data_address(bits >> 8, (uintptr_t)ring, len),
        .len = (uint32_t)len,
        .id = (uint32_t)bits,
        .reserved = bits,
    };
    if (op != HVT_RING_NET_READ && op != HVT_RING_NET_WRITE)
        return ANSWERED;
    return fate_of_buffer(entry->data_gpa, entry->len, reads);
}

static void publish(void)
{
    __atomic_store_n(&ring->ent_tail, tail, __ATOMIC_SEQ_CST);
    raw_kick();
}

static void wait_until_handled(void)
{
    while (__atomic_load_n(&ring->ent_head, __ATOMIC_ACQUIRE) != tail)
        __asm__ volatile("pause" : : : "memory");
}

static void put_entry(enum fate wanted)
{
    struct hvt_ring_entry entry;

    while (forge_entry(&entry) != wanted)
        ;
    ring->entries[tail++ % HVT_RING_ENTRIES] = entry;
}

/* In batches of any size, with the tender's own fields overwritten now and then. */
static void make_entries(uint64_t count)
{
    while (count > 0) {
        uint64_t bits = next(), batch = 1 + (bits >> 32) % 200;
        for (uint64_t i = 0; i < batch; i++)
            put_entry(ANSWERED);
        if ((bits & 7) == 0)
            ring->com_tail = (uint32_t)bits;
        if ((bits & 24) == 0)
            ring->com_head = ring->needs_kick = (uint32_t)bits;
        publish();
        wait_until_handled();
        count -= batch < count ? batch : count;
    }
}

static void overwrite_ring(uint64_t nth)
{
    seed += nth;
    for (uint64_t *at = (uint64_t *)ring; at < (uint64_t *)(ring + 1); at++)
        *at = next();
    if ((nth & 1) == 0) /* an index that may be, and entries that are anything */
        ring->ent_tail = (uint32_t)(seed % HVT_RING_ENTRIES);
    raw_kick();
}

/* ---- Words ---- */

static uint32_t number_of(const char *word)
{
    for (uint32_t number = 1; number <= HVT_HYPERCALL_HALT; number++)
        if (is_word(word, NAMES[number]))
            return number;
    return HVT_HYPERCALL_WALLTIME;
}

/* Each page once, so that all runs of this guest have the same memory. */
static void touch_all(void)
{
    for (uint64_t at = ground; at < mem; at += 4096)
        *(volatile uint8_t *)at = 0;
}

/* Long enough for somebody to look. */
static void pause(void)
{
    solo5_time_t until = solo5_clock_monotonic() + 300000000;

    puts("a tenth");
    while (solo5_clock_monotonic() < until)
        __asm__ volatile("pause" : : : "memory");
}

static _Noreturn void sleep_for_ever(void)
{
    struct hvt_poll *block = (struct hvt_poll *)ground;

    verdict();
    puts("holding");
    for (;;) { /* a frame that nobody reads makes POLL return */
        block->timeout_nsecs = 100000000;
        raw_hypercall(HVT_HYPERCALL_POLL, block);
    }
}

static const char *words;

static void make_many(uint32_t number, uint64_t count, bool holds)
{
    uint64_t first = holds ? count / 10 : 0;

    for (int part = 0; part < 2; part++) {
        uint64_t more = part == 0 ? first : count - first;
        if (number == 0)
            make_entries(more);
        else
            make_calls(number, more);
        if (part == 0 && holds)
            pause();
    }
    if (holds)
        sleep_for_ever();
}

static int run(void)
{
    bool rings = is_word(words, "ring") || is_word(words, "ring-end") || is_word(words, "ring-wild");
    uint32_t number = rings ? 0 : number_of(word_at(words, 1));
    unsigned at = rings ? 1 : 2;
    uint64_t count = number_at(word_at(words, at + 1), 1);
    bool holds = is_word(word_at(words, at + 2), "hold");

    seed = number_at(word_at(words, at), 1) * 0x1000193 + number;
    touch_all();
    puts("forging");
    if (is_word(words, "calls") || is_word(words, "ring"))
        make_many(number, count, holds);
    else if (is_word(words, "end"))
        make_one(number, ENDED, count);
    else if (is_word(words, "wild"))
        make_one(number, WILD, count);
    else if (is_word(words, "ring-wild"))
        overwrite_ring(count);
    else {
        put_entry(ENDED);
        publish();
    }
    if (is_word(words, "ring-end") || is_word(words, "ring-wild"))
        for (uint64_t i = 0; i < 200000; i++) /* until the ring's thread has seen it */
            __asm__ volatile("pause" : : : "memory");
    if (is_word(words, "end") || is_word(words, "ring-end"))
        return survived();
    return verdict();
}

/* The stack moves out of the way: the end of memory is forged with as well. */
static uint8_t stack[STACK_BYTES] __attribute__((aligned(16)));

__attribute__((used)) static _Noreturn void on_own_stack(void)
{
    solo5_exit(run());
}

int solo5_app_main(const struct solo5_start_info *info)
{
    struct solo5_block_info disk;
    solo5_handle_t handle;

    EXPECT(solo5_block_acquire("storage", &handle, &disk) == SOLO5_R_OK);
    EXPECT(handle == STORAGE);
    capacity = disk.capacity;
    ground = (info->heap_start + 4095) & ~(uint64_t)4095;
    mem = info->heap_start + info->heap_size;
    ring = (struct hvt_ring *)mem;
    words = info->cmdline;
    fill_tables();
    __asm__ volatile("movq %0, %%rsp\n\tcall on_own_stack" : : "r"(stack + STACK_BYTES) : "memory");
    __builtin_unreachable();
}
#else
int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    puts("this guest is about x86_64");
    return verdict();
}
#endif
