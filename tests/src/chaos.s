# A guest that means harm: it writes what it likes to the registers of its disk, to the rings and to ports, of any width and in
# any order, while the device serves them. After each round it resets the disk, and is an honest driver for four requests. A dot
# for each round.
#
# The device may write wherever the rings say, so that they only ever name memory that this program can do without: descriptors
# that were read from the disk are made of the same values.

.set CHAOS_STACK, 0x1e00000
.set CHAOS_DATA, 0x300000               # 128 KiB
.set CHAOS_STEPS, 2048                  # accesses in a round

.macro random_below bits                # %eax
    call random
    andl $((1 << \bits) - 1), %eax
.endm

random:                                 # xorshift32 (Marsaglia); changes %ecx
    movl chaos_seed - guest_start + GUEST_BASE, %eax
    movl %eax, %ecx
    shll $13, %ecx
    xorl %ecx, %eax
    movl %eax, %ecx
    shrl $17, %ecx
    xorl %ecx, %eax
    movl %eax, %ecx
    shll $5, %ecx
    xorl %ecx, %eax
    movl %eax, chaos_seed - guest_start + GUEST_BASE
    ret

random_value:                           # %eax: any bits, a small number, or one of the addresses
    random_below 2
    cmpl $1, %eax
    jb random
    ja random_address
    random_below 4
    ret

random_address:                         # %eax: the rings themselves, data, the top of RAM, the hole, a device, no memory at all
    random_below 3
    load_address %ecx, chaos_addresses
    movl (%ecx,%eax,4), %eax
    cmpl $CHAOS_DATA, %eax
    jne 0f
    random_below 12
    shll $4, %eax
    addl $CHAOS_DATA, %eax
0:  ret

chaos_step:
    random_below 4
    load_address %ecx, chaos_actions
    movl (%ecx,%eax,4), %eax
    addl $GUEST_BASE, %eax
    jmp *%eax

chaos_register:                         # a register, or the configuration space, as the specification has it
    random_below 7
    leal (%ebp,%eax,4), %edi
    call random_value
    movl %eax, (%edi)
    ret

chaos_narrow:                           # any width, anywhere in the page
    random_below 12
    leal (%ebp,%eax), %edi
    call random_value
    testl $0x100, %eax
    jz 0f
    movb %al, (%edi)
    movw %ax, (%edi)
    ret
0:  cmpl $(VIRTIO + 0xffc), %edi
    ja 1f
    movl %eax, (%edi)
1:  ret

chaos_read:
    random_below 12
    movb (%ebp,%eax), %cl
    andl $0xffc, %eax
    movl (%ebp,%eax), %ecx
    ret

chaos_descriptor:                       # address, length, flags and next
    random_below 3
    shll $4, %eax
    leal DESCRIPTORS(%eax), %edi
    call random_address
    movl %eax, (%edi)
    random_below 3
    cmpl $1, %eax
    movl $0, 4(%edi)
    ja 0f
    movl %eax, 4(%edi)
0:  random_below 16
    movl %eax, 8(%edi)
    random_below 3                      # NEXT, WRITE, INDIRECT
    movw %ax, 12(%edi)
    random_below 3
    movw %ax, 14(%edi)
    ret

chaos_header:
    random_below 4
    movl %eax, HEADER
    random_below 7
    movl %eax, HEADER + 8
    ret

chaos_chain:                            # makes a chain available: often a sound one
    movl $HEADER, DESCRIPTORS
    movl $0, DESCRIPTORS + 4
    movl $16, DESCRIPTORS + 8
    movl $0x00010001, DESCRIPTORS + 12
    random_below 2
    movw %ax, AVAILABLE + 4
    addw $1, AVAILABLE + 2
    movl $0, 0x050(%ebp)                # QueueNotify
    ret

chaos_index:                            # an available index that is a lie, or any other word of the rings
    random_below 8
    movw %ax, AVAILABLE + 2
    random_below 6
    movw %ax, USED(,%eax,2)
    ret

chaos_kick:
    random_below 2
    movl %eax, 0x050(%ebp)
    ret

chaos_port:                             # the serial port but for its data, the PIT, the RTC, and ports where nothing is
    random_below 4
    load_address %ecx, chaos_ports
    movw (%ecx,%eax,2), %dx
    call random
    outb %al, %dx
    inb %dx, %al
    outw %ax, %dx
    inl %dx, %eax
    ret

chaos_live:                             # now and then a device that works
    random_below 4
    cmpl $0, %eax
    je restart_device
    ret

restart_device:
    movl $VIRTIO, %ebp
    movl $0, 0x070(%ebp)
0:  cmpl $0, 0x070(%ebp)                # the device waits for the host's disk
    jne 0b
    movl $DESCRIPTORS, %edi             # `request` leaves alone what is 0: entries of the rings, high halves of addresses
    movl $0, %eax
    movl $((HEADER - DESCRIPTORS) / 4), %ecx
    rep stosl
    jmp start_device

guest_chaos:
    movl $CHAOS_STACK, %esp
    movl $VIRTIO, %ebp
0:  movl $CHAOS_STEPS, %esi
1:  pushl %esi
    call chaos_step
    popl %esi
    subl $1, %esi
    jnz 1b
    call restart_device
    movl $0xc3000000, %eax
    call fill_data
    submit 1, 200, 0, 512, 0, 1, 110    # behind what a random sector reaches
    submit 4, 0, NO_DATA, 0, 0, 1, 112
    movl $0, %eax
    call fill_data
    submit 0, 200, FROM_DEVICE, 512, 0, 513, 114
    movl $0xc3000000, %eax
    movb $116, %bl
    call check_data
    out_byte COM1 + 3, 3                # LCR: data, not the divisor
    out_byte COM1 + 4, 0                # MCR: no loopback
    out_byte COM1 + 1, 0                # IER
    movb $'.', %al
    call put_char
    jmp 0b

.balign 4
chaos_seed: .long 0x9e3779b9
chaos_addresses:
    .long DESCRIPTORS, USED, HEADER, CHAOS_DATA, CHAOS_DATA, 0x1fffff8, VIRTIO, 0xfee00000
chaos_actions:
    .long chaos_register - guest_start, chaos_register - guest_start, chaos_register - guest_start, chaos_narrow - guest_start
    .long chaos_narrow - guest_start, chaos_read - guest_start, chaos_descriptor - guest_start, chaos_descriptor - guest_start
    .long chaos_descriptor - guest_start, chaos_header - guest_start, chaos_header - guest_start, chaos_chain - guest_start
    .long chaos_index - guest_start, chaos_kick - guest_start, chaos_port - guest_start, chaos_live - guest_start
chaos_ports:
    .word COM1 + 1, COM1 + 2, COM1 + 3, COM1 + 4, COM1 + 5, COM1 + 6, COM1 + 7, 0x40
    .word 0x42, 0x43, 0x70, 0x71, 0x80, 0xcf8, 0xcfc, 0x3d5
