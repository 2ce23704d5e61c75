/*
 * Remembers on the block device "storage" how often it was started, and what it was told last time.
 * The rule: the first block is ours when it begins with our signature and its check sum fits; an
 * empty disk becomes ours, and anything else is left alone.
 */
#include <solo5.h>
#include <stdio.h>
#include <string.h>

static const char signature[16] = "ptender notebook";

struct notebook {
    char signature[16];
    uint64_t starts;
    solo5_time_t written; /* by the wall clock */
    char note[128];
    uint64_t check;
};

union block {
    struct notebook notebook;
    uint8_t bytes[4096];
};

struct disk {
    solo5_handle_t handle;
    struct solo5_block_info info;
};

/* FNV-1a over everything before the check sum itself. */
static uint64_t check_of(const struct notebook *book)
{
    const uint8_t *bytes = (const uint8_t *)book;
    uint64_t hash = 0xcbf29ce484222325;

    for (size_t i = 0; i < offsetof(struct notebook, check); i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

static bool is_ours(const struct notebook *book)
{
    return memcmp(book->signature, signature, sizeof signature) == 0 &&
           book->check == check_of(book);
}

static bool is_empty(const struct disk *disk, const union block *block)
{
    for (size_t i = 0; i < disk->info.block_size; i++)
        if (block->bytes[i] != 0)
            return false;
    return true;
}

static bool open_disk(struct disk *disk)
{
    return solo5_block_acquire("storage", &disk->handle, &disk->info) == SOLO5_R_OK &&
           disk->info.block_size <= sizeof(union block);
}

static bool read_first(const struct disk *disk, union block *block)
{
    return solo5_block_read(disk->handle, 0, block->bytes, disk->info.block_size) == SOLO5_R_OK;
}

/* What was written is read again: a disk that only says so is found out now, and not when its data
 * is needed. */
static bool write_first(const struct disk *disk, const union block *block)
{
    static union block again;

    return solo5_block_write(disk->handle, 0, block->bytes, disk->info.block_size) == SOLO5_R_OK &&
           read_first(disk, &again) && memcmp(&again, block, disk->info.block_size) == 0;
}

static void take_note(struct notebook *book, const char *note)
{
    size_t length = strnlen(note, sizeof book->note - 1);

    memcpy(book->signature, signature, sizeof signature);
    memset(book->note, 0, sizeof book->note);
    memcpy(book->note, note, length);
    book->starts++;
    book->written = solo5_clock_wall();
    book->check = check_of(book);
}

static void print_last_time(const struct notebook *book)
{
    uint64_t ago = (solo5_clock_wall() - book->written) / 1000000000;

    printf("Last started %lu s ago, and told: %s\n", ago,
           book->note[0] != '\0' ? book->note : "(nothing)");
}

static int fail(const char *why)
{
    printf("FAILURE: %s\n", why);
    return SOLO5_EXIT_FAILURE;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    static union block block;
    struct disk disk;

    if (!open_disk(&disk))
        return fail("no storage, or its blocks are larger than 4096 bytes");
    printf("A disk of %lu blocks of %lu bytes\n", disk.info.capacity / disk.info.block_size,
           disk.info.block_size);
    if (!read_first(&disk, &block))
        return fail("the first block can't be read");
    if (is_ours(&block.notebook))
        print_last_time(&block.notebook);
    else if (!is_empty(&disk, &block))
        return fail("the disk has something else on it");

    take_note(&block.notebook, info->cmdline);
    if (!write_first(&disk, &block))
        return fail("the first block can't be written");
    printf("Started %lu %s now\n", block.notebook.starts,
           block.notebook.starts == 1 ? "time" : "times");
    return SOLO5_EXIT_SUCCESS;
}
