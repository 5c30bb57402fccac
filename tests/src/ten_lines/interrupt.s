interrupt:                              # waits for interrupts of vector 32, and writes a byte to port 0x11 for each
    movw $(handler - interrupt + LOADED), 32 * 4
    movw $0, 32 * 4 + 2                 # the vector table has an offset and a segment for each vector
    sti
wait:
    hlt
    jmp wait
handler:
    movb $'!', %al
    outb %al, $0x11
    iret
