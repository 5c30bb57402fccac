# Guests with several vCPUs, which share a disk or have one each. The others are started by INIT and SIPI to all but this one
# (SDM 3A 11.6.1), in real mode at CROWD_CODE, and go to protected mode as the first one is.

.set CROWD_CODE, 0x8000                 # the vector of the SIPI is its page
.set CROWD_PRESENT, 0x9000              # a byte for each vCPU by its APIC ID: it is about to reset the disk
.set CROWD_GDT, 0x9100                  # null, code, data; behind them what lgdt loads
.set CROWD_GDTR, 0x9118

start_others:                           # %edi: where they go, in 32-bit mode with flat segments and no stack; changes %eax, %ecx, %esi
    movl %edi, crowd_target - guest_start + GUEST_BASE
    movl $0, CROWD_GDT
    movl $0, CROWD_GDT + 4
    movl $0x0000ffff, CROWD_GDT + 8
    movl $0x00cf9b00, CROWD_GDT + 12
    movl $0x0000ffff, CROWD_GDT + 16
    movl $0x00cf9300, CROWD_GDT + 20
    movw $23, CROWD_GDTR
    movl $CROWD_GDT, CROWD_GDTR + 2
    load_address %esi, crowd_code
    movl $CROWD_CODE, %edi
    movl $(crowd_code_end - crowd_code), %ecx
    rep movsb
    movl $0x1ff, LAPIC + 0xf0           # spurious interrupt vector register: enabled
    movl $0xc4500, LAPIC + 0x300        # INIT
    movl $(0xc4600 | CROWD_CODE >> 12), LAPIC + 0x300
    ret

.code16
crowd_code:
    movw $0, %ax
    movw %ax, %ds
    lgdtl CROWD_GDTR
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $(crowd_protected - guest_start + GUEST_BASE)
crowd_code_end:
.code32
crowd_protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl crowd_target - guest_start + GUEST_BASE, %eax
    jmp *%eax

.balign 4
crowd_target: .long 0

# ---- many vCPUs at one disk -------------------------------------------------------------------------------------
# Each typed byte is a step: a write is given to the disk; as many other vCPUs as the byte says reset it, and then this one does.

guest_crowd:
    movl $STACK_TOP, %esp
    call start_device
    load_address %esi, ready_text
    call put_string
    call get_char
    movl $1, HEADER                     # a write of sector 0
    movl $HEADER, DESCRIPTORS           # as in `request`, without waiting for the answer
    movl $16, DESCRIPTORS + 8
    movl $0x00010001, DESCRIPTORS + 12
    movl $DATA, DESCRIPTORS + 16
    movl $512, DESCRIPTORS + 24
    movl $0x00020001, DESCRIPTORS + 28
    movl $STATUS, DESCRIPTORS + 32
    movl $1, DESCRIPTORS + 40
    movl $FROM_DEVICE, DESCRIPTORS + 44
    movl $0x10000, AVAILABLE
    movl $0, 0x050(%ebp)                # QueueNotify
    call get_char
    movzbl %al, %ebx
    load_address %edi, crowd_member
    call start_others
0:  movl $0, %ecx                       # how many are there
    movl $0, %esi
1:  movzbl CROWD_PRESENT(%esi), %eax
    addl %eax, %ecx
    addl $1, %esi
    cmpl $256, %esi
    jne 1b
    cmpl %ebx, %ecx
    jb 0b
    load_address %esi, crowd_text
    call put_string
    movl $0, 0x070(%ebp)                # Status: reset
2:  cmpl $0, 0x070(%ebp)
    jne 2b
    load_address %esi, reset_text
    call put_string
    jmp guest_spin
crowd_text: .asciz "all here\n"

crowd_member:
    movl LAPIC + 0x20, %ecx             # APIC ID
    shrl $24, %ecx
    movb $1, CROWD_PRESENT(%ecx)
    movl $0, VIRTIO + 0x070             # Status: reset
    cli
0:  hlt
    jmp 0b

get_char:                               # %al; changes %dx
    movw $COM1_LSR, %dx
0:  inb %dx, %al
    testb $1, %al
    jz 0b
    movw $COM1, %dx
    inb %dx, %al
    ret

# ---- an honest driver beside one that means harm -----------------------------------------------------------------
# The second vCPU is guest_chaos at the first disk. The first one writes a sector of the second disk, clears its buffer, reads it
# back and compares, again and again; a dot on the second serial port for each. Its rings are where no ring of the other names.

.set HONEST, 0x400000                   # descriptors; the others at the same distances as DESCRIPTORS'
.set HONEST_AVAILABLE, HONEST + 0x1000
.set HONEST_USED, HONEST + 0x2000
.set HONEST_HEADER, HONEST + 0x3000
.set HONEST_STATUS, HONEST + 0x3100
.set HONEST_DATA, HONEST + 0x4000
.set HONEST_SECTORS, 64

guest_beside_chaos:
    movl $STACK_TOP, %esp
    load_address %edi, guest_chaos
    call start_others
    movl $(VIRTIO + 0x1000), %ebp
    movl $0, 0x070(%ebp)                # Status, as in start_device
    movl $3, 0x070(%ebp)
    movl $1, 0x024(%ebp)                # DriverFeaturesSel
    movl $1, 0x020(%ebp)                # VERSION_1
    movl $11, 0x070(%ebp)
    require 0x070, 11, 120
    movl $0, 0x030(%ebp)                # QueueSel
    movl $QUEUE_SIZE, 0x038(%ebp)       # QueueNum
    movl $HONEST, 0x080(%ebp)
    movl $0, 0x084(%ebp)
    movl $HONEST_AVAILABLE, 0x090(%ebp)
    movl $0, 0x094(%ebp)
    movl $HONEST_USED, 0x0a0(%ebp)
    movl $0, 0x0a4(%ebp)
    movl $1, 0x044(%ebp)                # QueueReady
    movl $15, 0x070(%ebp)
    require 0x070, 15, 121
    movl $0, %ebx                       # the round; its words count up from 128 times its number
0:  movl %ebx, %eax
    shll $7, %eax
    movl $HONEST_DATA, %edi
1:  movl %eax, (%edi)
    addl $4, %edi
    addl $1, %eax
    cmpl $(HONEST_DATA + 512), %edi
    jne 1b
    movl $1, %eax                       # write
    movl $0, %ecx
    call honest_request
    movl $HONEST_DATA, %edi
    movl $128, %ecx
    movl $0, %eax
    rep stosl
    movl $0, %eax                       # read
    movl $FROM_DEVICE, %ecx
    call honest_request
    movl %ebx, %eax
    shll $7, %eax
    movl $HONEST_DATA, %edi
2:  cmpl %eax, (%edi)
    jne honest_failed
    addl $4, %edi
    addl $1, %eax
    cmpl $(HONEST_DATA + 512), %edi
    jne 2b
    movw $COM2, %dx
    movb $'.', %al
    outb %al, %dx
    addl $1, %ebx
    jmp 0b
honest_failed:
    exit 122

honest_request:                         # %eax type, %ecx flags of the data; the sector is that of round %ebx
    movl %eax, HONEST_HEADER
    movl %ebx, %edx
    andl $(HONEST_SECTORS - 1), %edx
    movl %edx, HONEST_HEADER + 8
    movb $0xff, HONEST_STATUS
    movl $HONEST_HEADER, HONEST
    movl $16, HONEST + 8
    movl $0x00010001, HONEST + 12
    movl $HONEST_DATA, HONEST + 16
    movl $512, HONEST + 24
    orl $0x00020001, %ecx
    movl %ecx, HONEST + 28
    movl $HONEST_STATUS, HONEST + 32
    movl $1, HONEST + 40
    movl $FROM_DEVICE, HONEST + 44
    movl HONEST_AVAILABLE, %edi
    addl $0x10000, %edi
    movl %edi, HONEST_AVAILABLE
    movl $0, 0x050(%ebp)                # QueueNotify
0:  movl HONEST_USED, %eax
    cmpl %edi, %eax
    jne 0b
    cmpb $0, HONEST_STATUS
    jne 1f
    ret
1:  exit 123
