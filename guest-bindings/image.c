/*
 * What the image says of itself. The manifest's note is not here: it is made for each guest.
 * The rule: notes sit in sections of their own, since each is to have a PT_NOTE of its own.
 */
#include "runtime.h"

/* The alignment is said too: compilers like to give large objects more, and a note's is part of its
 * format. */
#define IN_SECTION(name, align) __attribute__((used, section(name), aligned(align)))

/* No kernel may run a guest as a program of its own: its interpreter cannot exist. */
static const char interpreter[] IN_SECTION(".interp", 1) = "/nonexistent/solo5/";

static const struct {
    uint32_t name_size, descriptor_size, type;
    char name[ABI1_NOTE_DESC_OFFSET - 12];
    struct abi1_info abi;
} abi_note IN_SECTION(".note.solo5.abi", ABI1_NOTE_ALIGN) = {
    .name_size = sizeof "Solo5",
    .descriptor_size = sizeof(struct abi1_info),
    .type = ABI1_NOTE_TYPE,
    .name = "Solo5",
    .abi = {.abi_target = BINDINGS_TARGET, .abi_version = BINDINGS_ABI_VERSION},
};
