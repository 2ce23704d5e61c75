/*
 * The first instructions, and the first after an exception.
 * The rule: only what C can't say is here: the stack's alignment and the CPU's exception frames.
 */

    .section .text.start, "ax", @progbits
    .globl _start
    .type _start, @function
/* _start(const struct hvt_boot_info *) in %rdi; the tender's stack has no alignment to rely on. */
_start:
    cld
    xorl %ebp, %ebp
    andq $-16, %rsp
    call hvt_start
    ud2
    .size _start, . - _start

/*
 * One stub for each of the 32 exceptions, 16 bytes apart, so that the IDT is filled by counting.
 * Each leaves what `struct trap_frame` describes: registers, vector and error code below the CPU's
 * own frame.
 */
    .text
    .globl hvt_trap_stubs
    .balign 16
hvt_trap_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    /* The CPU itself pushes an error code for 8, 10..14, 17, 21, 29 and 30. */
    .if ((0x60227d00 >> vector) & 1) == 0
    pushq $0
    .endif
    pushq $vector
    jmp trap_entry
    .set vector, vector + 1
    .endr

    .type trap_entry, @function
trap_entry:
    cld
    .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rcx, rbx
    pushq %\register
    .endr
    movq %rsp, %rdi
    andq $-16, %rsp
    call hvt_trap
    ud2
    .size trap_entry, . - trap_entry

    .section .note.GNU-stack, "", @progbits
