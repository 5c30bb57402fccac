# The benchmark's guest: enters through PVH, drops to CPL 3 and drives the first virtio-blk device it finds from there,
# polling. Even a KVM done in software lets code at CPL 3 run at the processor's own speed, but for port I/O and
# interrupts: there are none before the end, where `ud2` leads to a CPL 0 handler that prints the results.
#
# The assembler knows the addresses of what `polling.rs` lays out: PML4, GDTR, IDTR, PARAMETERS; and STACK, COM1.

.set POLL_BASE, 0x100000
.set QUEUE_SIZE, 128
.set DESCRIPTORS, 0x200000              # 16 bytes each: headers' from 0, data's from SLOTS, statuses' from 2 * SLOTS
.set AVAILABLE, 0x201000
.set USED, 0x202000
.set HEADERS, 0x203000                  # 16 bytes a slot
.set STATUSES, 0x204000                 # a byte a slot
.set STAMPS, 0x205000                   # 8 bytes a slot: the TSC when its request was made
.set LATENCIES, 0x206000                # histogram of latencies: 4 bytes a bucket
.set BUCKETS, 960
.set DATA, 0x400000                     # 128 KiB a slot
.set SLOTS, 32
.set USED_EVENT, AVAILABLE + 4 + 2 * QUEUE_SIZE
.set AVAILABLE_EVENT, USED + 4 + 8 * QUEUE_SIZE

.code32
poll_entry:
    movl $PML4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax                     # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx              # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax               # PG
    movl %eax, %cr0
    lgdt GDTR
    ljmp $0x08, $(poll_long_mode - poll_start + POLL_BASE)

.code64
poll_long_mode:
    lidt IDTR
    movw $0x28, %ax
    ltr %ax
    movw $COM1, %dx                     # for the host's watch
    movb $'R', %al
    outb %al, %dx
    movl $STACK, %esp
    pushq $0x1b                         # ss, rsp, rflags, cs, rip: all CPL 3
    pushq $STACK - 0x1000
    pushq $2
    pushq $0x23
    pushq $(poll_user - poll_start + POLL_BASE)
    iretq

# ---- CPL 3 --------------------------------------------------------------------------------------------------------
# %rdi the device's registers, %r15 PARAMETERS, %r14 the job; per job: %r13 requests to submit, %r12 to complete,
# %bx available index, %r10w the one last published, %bp used index, %r11 random state.
# PARAMETERS: first register window, stride, windows, jobs (8 bytes each); then the jobs, JOB bytes each:
#  0 type  4 data descriptor's flags  8 bytes  12 depth  16 requests  24 random  32 position mask  40 sectors a position
#  64 three ranks in ascending order: the latencies of how many requests
#  and back: 48 TSC ticks  56 notifications  64 for each rank the bucket that contains it
.set JOB, 96

.macro die code
    movl $\code, %eax
    ud2
.endm

poll_user:
    movl $PARAMETERS, %r15d
    movq (%r15), %rdi
    movq 16(%r15), %rcx
0:  cmpl $2, 8(%rdi)                    # DeviceID: block
    je 1f
    addq 8(%r15), %rdi
    decq %rcx
    jnz 0b
    die 1
1:  movl $0, 0x70(%rdi)
    movl $1, 0x70(%rdi)
    movl $3, 0x70(%rdi)
    movl $1, 0x24(%rdi)
    movl $1, 0x20(%rdi)                 # VERSION_1
    movl $0, 0x24(%rdi)
    movl $0, 0x14(%rdi)
    movl 0x10(%rdi), %eax
    andl $0x20000200, %eax              # EVENT_IDX, BLK_F_FLUSH: without the latter every write is a flush
    movl %eax, 0x20(%rdi)
    movl $11, 0x70(%rdi)
    cmpl $11, 0x70(%rdi)
    je 2f
    die 2
2:  movl $0, 0x30(%rdi)
    movl $QUEUE_SIZE, 0x38(%rdi)
    movl $DESCRIPTORS, 0x80(%rdi)
    movl $0, 0x84(%rdi)
    movl $AVAILABLE, 0x90(%rdi)
    movl $0, 0x94(%rdi)
    movl $USED, 0xa0(%rdi)
    movl $0, 0xa4(%rdi)
    movl $1, 0x44(%rdi)
    movl $15, 0x70(%rdi)
    cmpl $15, 0x70(%rdi)
    je 3f
    die 3
3:  movw $1, AVAILABLE                  # NO_INTERRUPT
    movabsq $0x9e3779b97f4a7c15, %r11
    xorl %ebx, %ebx
    xorl %ebp, %ebp
    xorl %r10d, %r10d
    leaq 32(%r15), %r14
    movq 24(%r15), %r9
poll_job:
    xorl %ecx, %ecx
0:  movl %ecx, %eax                     # slot %ecx: its three descriptors (address, length, flags, next)
    shll $4, %eax
    leaq HEADERS(%rax), %rdx
    movl (%r14), %esi
    movq %rsi, (%rdx)
    movq %rdx, DESCRIPTORS(%rax)
    movl $16, DESCRIPTORS + 8(%rax)
    movw $1, DESCRIPTORS + 12(%rax)
    leal SLOTS(%rcx), %edx
    movw %dx, DESCRIPTORS + 14(%rax)
    movl %ecx, %edx
    shll $17, %edx
    addl $DATA, %edx
    movq %rdx, DESCRIPTORS + 16 * SLOTS(%rax)
    movl 8(%r14), %edx
    movl %edx, DESCRIPTORS + 16 * SLOTS + 8(%rax)
    movl 4(%r14), %edx
    orl $1, %edx
    movw %dx, DESCRIPTORS + 16 * SLOTS + 12(%rax)
    leal 2 * SLOTS(%rcx), %edx
    movw %dx, DESCRIPTORS + 16 * SLOTS + 14(%rax)
    leaq STATUSES(%rcx), %rdx
    movq %rdx, DESCRIPTORS + 32 * SLOTS(%rax)
    movl $1, DESCRIPTORS + 32 * SLOTS + 8(%rax)
    movl $2, DESCRIPTORS + 32 * SLOTS + 12(%rax)
    movb $0xff, STATUSES(%rcx)
    incl %ecx
    cmpl 12(%r14), %ecx
    jb 0b
    movq 16(%r14), %r13
    movq %r13, %r12
    movq $0, 56(%r14)
    call poll_clear_latencies
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, 48(%r14)
    xorl %ecx, %ecx
1:  call poll_submit
    incl %ecx
    cmpl 12(%r14), %ecx
    jb 1b
    call poll_publish
poll_wait:
    pause
    movzwl USED + 2, %r8d
    cmpw %bp, %r8w
    je poll_wait
2:  movzwl %bp, %eax
    andl $(QUEUE_SIZE - 1), %eax
    movl USED + 4(,%rax,8), %ecx        # the head is the slot
    cmpb $0, STATUSES(%rcx)
    je 3f
    die 4
3:  movb $0xff, STATUSES(%rcx)
    call poll_record_latency
    incl %ebp
    decq %r12
    testq %r13, %r13
    jz 4f
    call poll_submit
4:  cmpw %bp, %r8w
    jne 2b
    call poll_publish
    testq %r12, %r12
    jnz poll_wait
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    subq 48(%r14), %rax
    movq %rax, 48(%r14)
    call poll_find_ranks
    addq $JOB, %r14
    decq %r9
    jnz poll_job
    xorl %eax, %eax
    ud2

poll_submit:                            # slot %ecx
    decq %r13
    cmpq $0, 24(%r14)
    je 0f
    movq %r11, %rax                     # xorshift64
    shlq $13, %rax
    xorq %rax, %r11
    movq %r11, %rax
    shrq $7, %rax
    xorq %rax, %r11
    movq %r11, %rax
    shlq $17, %rax
    xorq %rax, %r11
    jmp 1f
0:  incq %r11
1:  movq %r11, %rax
    andq 32(%r14), %rax
    imulq 40(%r14), %rax
    movl %ecx, %edx
    shll $4, %edx
    movq %rax, HEADERS + 8(%rdx)
    movzwl %bx, %eax
    andl $(QUEUE_SIZE - 1), %eax
    movw %cx, AVAILABLE + 4(,%rax,2)
    incl %ebx
    rdtsc
    movl %eax, STAMPS(,%rcx,8)
    movl %edx, STAMPS + 4(,%rcx,8)
    ret

poll_record_latency:                    # of slot %ecx: ticks + 16, 16 buckets a power of two; changes %rax, %rdx, %rsi
    rdtsc
    shlq $32, %rdx
    orq %rax, %rdx
    subq STAMPS(,%rcx,8), %rdx
    addq $16, %rdx
    movl %ecx, %esi
    bsrq %rdx, %rcx
    subl $4, %ecx
    shrq %cl, %rdx                      # 16 to 31
    shll $4, %ecx
    leal -16(%rcx,%rdx), %edx
    incl LATENCIES(,%rdx,4)
    movl %esi, %ecx
    ret

poll_clear_latencies:
    movl $BUCKETS, %ecx
0:  movl $0, LATENCIES - 4(,%rcx,4)
    decl %ecx
    jnz 0b
    ret

poll_find_ranks:                        # replaces each of the job's ranks by its bucket
    movl $-1, %edx
    xorl %eax, %eax
    xorl %ecx, %ecx
0:  cmpq 64(%r14,%rcx,8), %rax
    jae 1f
    incl %edx
    movl LATENCIES(,%rdx,4), %esi
    addq %rsi, %rax
    jmp 0b
1:  movq %rdx, 64(%r14,%rcx,8)
    incl %ecx
    cmpl $3, %ecx
    jb 0b
    ret

poll_publish:
    cmpw %bx, %r10w
    je 1f
    leal -1(%rbp), %eax
    movw %ax, USED_EVENT                # behind us: no interrupts
    movw %bx, AVAILABLE + 2
    mfence                              # before the device's wish is read (virtio 1.2 §2.7.13)
    testw $1, USED
    jnz 0f
    movl %ebx, %eax                     # vring_need_event: new - event - 1 < new - old
    subw AVAILABLE_EVENT, %ax
    decl %eax
    movl %ebx, %edx
    subl %r10d, %edx
    cmpw %dx, %ax
    jae 0f
    movl $0, 0x50(%rdi)
    incq 56(%r14)
0:  movl %ebx, %r10d
1:  ret

# ---- CPL 0 again --------------------------------------------------------------------------------------------------

poll_fault:                             # anything but `ud2`
    movl $0xff, %eax
poll_end:                               # %eax 0: the results; else what failed
    testl %eax, %eax
    jz 0f
    movl %eax, %esi
    movb $'F', %al
    call poll_put
    movq %rsi, %rbx
    call poll_hex
    jmp 2f
0:  leaq 32 + 48(%r15), %r14
    movq 24(%r15), %r9
1:  xorl %esi, %esi                     # five numbers
4:  movq (%r14,%rsi,8), %rbx
    call poll_hex
    movb $' ', %al
    call poll_put
    incl %esi
    cmpl $5, %esi
    jb 4b
    movb $'\n', %al
    call poll_put
    addq $JOB, %r14
    decq %r9
    jnz 1b
    movb $'E', %al
    call poll_put
2:  movb $'\n', %al
    call poll_put
3:  pause                               # the host measures and kills
    jmp 3b

poll_hex:                               # %rbx; changes %rax, %rcx, %rdx
    movl $16, %ecx
0:  rolq $4, %rbx
    movl %ebx, %eax
    andl $15, %eax
    addl $'0', %eax
    cmpl $'9', %eax
    jbe 1f
    addl $('a' - '0' - 10), %eax
1:  call poll_put
    decl %ecx
    jnz 0b
    ret

poll_put:                               # %al; changes %ah, %dx
    movb %al, %ah
    movw $COM1 + 5, %dx
0:  inb %dx, %al
    testb $0x20, %al
    jz 0b
    movb %ah, %al
    movw $COM1, %dx
    outb %al, %dx
    ret
