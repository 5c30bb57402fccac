port:                                   # reads a byte from port 0x10, and writes it plus one to port 0x11
    inb $0x10, %al
    addb $1, %al
    outb %al, $0x11
    hlt
