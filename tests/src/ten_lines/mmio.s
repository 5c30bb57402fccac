mmio:                                   # reads 4 bytes from address 0x20000, where no memory is, and writes them plus one to the next 4
    movw $0x2000, %ax
    movw %ax, %ds                       # real mode: DS * 16 is the base of addresses
    movl 0, %eax
    addl $1, %eax
    movl %eax, 4
    hlt
