/*
 * The first instructions.
 * The rule: only what C can't say is here: the stack's alignment.
 */

    .section .text.start, "ax", @progbits
    .globl _start
    .type _start, @function
/* _start(const struct spt_boot_info *) in %rdi; the tender's stack has no alignment to rely on. */
_start:
    cld
    xorl %ebp, %ebp
    andq $-16, %rsp
    call hvt_spt_start
    ud2
    .size _start, . - _start

    .section .note.GNU-stack, "", @progbits
