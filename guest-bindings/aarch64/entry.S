/*
 * The first instructions, and the first after an exception.
 * The rule: only what C can't say is here: the first frame and the registers at an exception.
 */

    .section .text.start, "ax", @progbits
    .globl _start
    .type _start, %function
/* _start(const struct hvt_boot_info *) in x0; the tender's stack pointer is a multiple of 16. */
_start:
    mov x29, xzr
    mov x30, xzr
    bl hvt_start
    udf #0
    .size _start, . - _start

/*
 * The vector table: four kinds (synchronous, IRQ, FIQ, SError) from each of four origins, 128 bytes
 * apart. x0 and x1 wait in thread registers that nobody else uses, because the stack pointer may
 * be what the exception is about.
 */
    .text
    .globl hvt_vectors
    .balign 2048
hvt_vectors:
    .set vector, 0
    .rept 16
    .balign 128
    msr tpidr_el1, x0
    msr tpidrro_el0, x1
    mov x0, #vector
    b trap_entry
    .set vector, vector + 1
    .endr

    .type trap_entry, %function
/* Fills hvt_trap_registers (x0 to x30, then SP) and goes on, on a stack of its own. */
trap_entry:
    adrp x1, hvt_trap_registers
    add x1, x1, :lo12:hvt_trap_registers
    stp x2, x3, [x1, #16]
    stp x4, x5, [x1, #32]
    stp x6, x7, [x1, #48]
    stp x8, x9, [x1, #64]
    stp x10, x11, [x1, #80]
    stp x12, x13, [x1, #96]
    stp x14, x15, [x1, #112]
    stp x16, x17, [x1, #128]
    stp x18, x19, [x1, #144]
    stp x20, x21, [x1, #160]
    stp x22, x23, [x1, #176]
    stp x24, x25, [x1, #192]
    stp x26, x27, [x1, #208]
    stp x28, x29, [x1, #224]
    mov x2, sp
    stp x30, x2, [x1, #240]
    mrs x2, tpidr_el1
    mrs x3, tpidrro_el0
    stp x2, x3, [x1]
    adrp x2, hvt_trap_stack_end
    add x2, x2, :lo12:hvt_trap_stack_end
    mov sp, x2
    mov x29, xzr
    mov x30, xzr
    bl hvt_trap
    udf #0
    .size trap_entry, . - trap_entry

    .bss
    .balign 16
    .zero 4096
hvt_trap_stack_end:

    .section .note.GNU-stack, "", @progbits
