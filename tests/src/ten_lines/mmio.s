mmio:                                   # reads a word from address 0x20000, where no memory is, and writes it plus one behind it
    movw $0x2000, %ax
    movw %ax, %ds                       # real mode: DS * 16 is the base of addresses
    movl 0, %eax
    addl $1, %eax
    movl %eax, 4
    hlt
