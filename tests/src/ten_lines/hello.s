hello:                                  # prints a text on the serial port
    movw $0x3f8, %dx                    # COM1
    movw $(text - hello + LOADED), %si
next:
    lodsb                               # AL = the byte at DS:SI, which counts up
    testb %al, %al
    jz end
    outb %al, %dx
    jmp next
end:
    hlt
text: .asciz "Hello\n"
