/* The memory that the children of a fork server share with it; heap.h has what each function does. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "heap.h"

#define PAGE 4096u
#define HUGE (2u << 20)
#define PRESENT (UINT64_C(1) << 63) /* Linux, Documentation/admin-guide/mm/pagemap.rst */
#define OF_A_FILE (UINT64_C(1) << 61)
#define LOOK_PAGES 256
#define LARGEST (64u << 10)
#define SMALL_BLOCK 1032u
#define SMALLEST_BLOCK 24u
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

static struct range {
    uint8_t *start;
    size_t length;
    size_t first_page; /* its number among those of all ranges */
} ranges[HEAP_RANGES];
static unsigned range_count;
static size_t page_count;
static uint8_t *content; /* of all ranges, as they were kept */
static size_t content_length;
static uint8_t copies[HEAP_PAGES / 8];

void heap_clear_cache(void)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyType_ClearCache();
    PyGILState_Release(state);
}

/* Take blocks of a size until one comes from the end of the heap, or from beyond. */
static void take_free_blocks(size_t size, uintptr_t end)
{
    uintptr_t block;
    do
        block = (uintptr_t)malloc(size); /* for good */
    while (block && block + size < end);
}

void heap_fill(void)
{
    const uintptr_t end = (uintptr_t)sbrk(0);
    for (size_t size = LARGEST; size > SMALL_BLOCK; size /= 2)
        take_free_blocks(size, end);
    for (size_t size = SMALL_BLOCK; size >= SMALLEST_BLOCK; size -= 16)
        take_free_blocks(size, end);
}

static int file_of(const uint8_t *start, size_t length)
{
    int fd = memfd_create("ptender-heap", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) /* Linux before 6.3 */
        fd = memfd_create("ptender-heap", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    for (size_t done = 0; done < length;) {
        ssize_t count = write(fd, start + done, length - done);
        if (count < 0) {
            int saved = errno;
            close(fd);
            errno = saved;
            return -1;
        }
        done += (size_t)count;
    }
    return fd;
}

int heap_reserve(size_t length)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    length = (length + HUGE - 1) / HUGE * HUGE;
    uint8_t *start = mmap(NULL, length + HUGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED)
        return -1;
    const size_t before = -(uintptr_t)start % HUGE;
    content = start + before;
    content_length = length;
    if (before)
        munmap(start, before);
    munmap(content + length, HUGE - before);
    madvise(content, length, MADV_HUGEPAGE); /* a fork shares them at the cost of a page */
    return 0;
}

int heap_keep(uintptr_t start, size_t length)
{
    struct range *range = &ranges[range_count];
    if (sysconf(_SC_PAGESIZE) != PAGE) {
        errno = ENOTSUP;
        return -1;
    }
    const uintptr_t of_thread = (uintptr_t)&errno; /* where the kernel writes, too: rseq(2) */
    if (start <= of_thread && of_thread - start < length)
        return 0;
    const size_t offset = page_count * PAGE;
    if (range_count == HEAP_RANGES || page_count + length / PAGE > HEAP_PAGES ||
        offset + length > content_length) {
        errno = ENOSPC;
        return -1;
    }
    range->start = (uint8_t *)start;
    range->length = length;
    range->first_page = page_count;
    int fd = file_of(range->start, length);
    if (fd < 0)
        return -1;
    memcpy(content + offset, range->start, length);
    const int flags = MAP_PRIVATE | MAP_FIXED;
    int error = 0;
    if (mmap(range->start, length, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED)
        error = errno;
    else
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW);
    close(fd);
    if (error) {
        errno = error;
        return -1;
    }
    range_count++;
    page_count += length / PAGE;
    return 0;
}

static int note_copies_of(const struct range *range, int pagemap)
{
    const size_t count = range->length / PAGE;
    const off_t offset = (off_t)((uintptr_t)range->start / PAGE * sizeof(uint64_t));
    uint64_t flags[LOOK_PAGES];
    for (size_t page = 0; page < count; page++) {
        const size_t index = page % LOOK_PAGES;
        const off_t at = offset + (off_t)(page * sizeof *flags);
        if (!index && pread(pagemap, flags, sizeof flags, at) != sizeof flags)
            return -1;
        const size_t number = range->first_page + page;
        if (flags[index] & PRESENT && !(flags[index] & OF_A_FILE))
            copies[number / 8] |= (uint8_t)(1u << number % 8);
    }
    return 0;
}

int heap_note_copies(int pagemap)
{
    for (unsigned i = 0; i < range_count; i++)
        if (note_copies_of(&ranges[i], pagemap))
            return -1;
    return 0;
}

static const uint8_t *as_kept(const struct range *range, size_t page)
{
    return content + (range->first_page + page) * PAGE;
}

static int is_as_kept(const struct range *range, size_t page, uintptr_t kept)
{
    const size_t number = range->first_page + page;
    const uint8_t *at = range->start + page * PAGE;
    if (!(copies[number / 8] & 1u << number % 8) || kept - (uintptr_t)at < PAGE)
        return 0;
    return !memcmp(at, as_kept(range, page), PAGE);
}

/* Whether these pages are still there: malloc shrinks its heap, and unmaps large blocks. */
static int are_mapped(const struct range *range, size_t first, size_t end)
{
    return !madvise(range->start + first * PAGE, (end - first) * PAGE, MADV_NORMAL);
}

static int give_back_run(const struct range *range, size_t page, size_t end)
{
    uint8_t *start = range->start + page * PAGE;
    const size_t length = (end - page) * PAGE;
    if (madvise(start, length, MADV_DONTNEED))
        return -1;
    /* Another mapping may be here by now, where a block was freed: then these pages are zero. */
    if (memcmp(start, as_kept(range, page), length))
        memcpy(start, as_kept(range, page), length);
    return 0;
}

static long give_back_pages(const struct range *range, size_t first, size_t last, uintptr_t kept)
{
    long given = 0;
    for (size_t page = first, end; page < last; page = end + 1) {
        for (end = page; end < last && is_as_kept(range, end, kept); end++)
            ;
        if (end > page && give_back_run(range, page, end))
            return -1;
        given += (long)(end - page);
    }
    return given;
}

static long give_back_of(const struct range *range, uintptr_t kept)
{
    const size_t count = range->length / PAGE;
    long given = 0;
    for (size_t first = 0; first < count; first += LOOK_PAGES) {
        const size_t last = count - first < LOOK_PAGES ? count : first + LOOK_PAGES;
        if (!are_mapped(range, first, last))
            continue;
        const long more = give_back_pages(range, first, last, kept);
        if (more < 0)
            return -1;
        given += more;
    }
    return given;
}

long heap_give_back(uintptr_t kept)
{
    long given = 0;
    heap_clear_cache();
#ifdef __GLIBC__
    malloc_trim(0);
#endif
    for (unsigned i = 0; i < range_count; i++) {
        const long more = give_back_of(&ranges[i], kept);
        if (more < 0)
            return -1;
        given += more;
    }
    munmap(content, content_length);
    range_count = 0;
    return given;
}
