# The small guests: one image, many entry points (`Program` in guest.rs), loaded at 1 MiB.
#
# Entered through PVH, so in 32-bit protected mode, flat, without paging, %ebx on the start info (xen.git
# docs/misc/pvh.pandoc). Nothing here takes an interrupt: everything polls. The assembler knows DEBUG_EXIT, COM1, PVPANIC,
# SLEEP_CONTROL, SLEEP_CONTROL_S5, RESET, RESET_VALUE, RESET_VECTOR, WARM_RESET_FLAG, I8042_COMMAND and VIRTIO from the
# machine's address map.

.set GUEST_BASE, 0x100000               # where the image is loaded
.set STACK_TOP, 0x90000                 # conventional memory above the command line, below the EBDA
.set SUCCESS, 42                        # exit status; what fails has its own number below
.set NO_SVM, 43                         # exit status: the processor has no SVM
.set COM1_LSR, COM1 + 5                 # line status: bit 0 data ready, bit 5 transmitter empty

# address(label): where a label of this image is when the guest runs
.macro load_address register, label
    movl $(\label - guest_start + GUEST_BASE), \register
.endm

.macro out_byte port, value
    movw $\port, %dx
    movb $\value, %al
    outb %al, %dx
.endm

.macro exit status
    movb $\status, %al
    jmp exit_with_al
.endm

.code32

# ---- ends -------------------------------------------------------------------------------------------------------

guest_poweroff:
    out_byte SLEEP_CONTROL, SLEEP_CONTROL_S5
    jmp guest_spin

guest_reset:
    out_byte RESET, RESET_VALUE
    jmp guest_spin

guest_reset_i8042:
    out_byte I8042_COMMAND, 0xfe
    jmp guest_spin

guest_panic:
    out_byte PVPANIC, 1
    jmp guest_spin

guest_panic_load:                       # goes on after it has said so
    out_byte PVPANIC, 1
    jmp guest_disk_load

guest_triple_fault:                     # an empty interrupt table: #UD, then the fault about that, then #DF
    movl $STACK_TOP, %esp
    pushl $0
    pushl $0
    lidt (%esp)
    ud2
    jmp guest_spin

guest_reboot_triple_fault:              # as Linux with reboot=t: what it says to the BIOS about a cold reboot comes first
    movw $0, WARM_RESET_FLAG
    jmp guest_triple_fault

guest_reboot_bios:                      # the code there is the same in this mode as in real mode
    movl $RESET_VECTOR, %eax
    jmp *%eax

guest_init:
    movl $0x1ff, 0xfee000f0             # local APIC: enabled by the spurious interrupt vector register
    movl $0, 0xfee00310                 # interrupt command: to APIC ID 0, INIT, level, asserted
    movl $0x4500, 0xfee00300
    jmp guest_spin

guest_halt:                             # interrupts are disabled at the entry
    hlt
    jmp guest_halt

guest_exit:
    exit SUCCESS

exit_with_al:
    outb %al, $DEBUG_EXIT
guest_spin:
    jmp guest_spin

# ---- serial port ------------------------------------------------------------------------------------------------
# Chosen so that the same bytes do the same in 64-bit mode.

put_char:                               # %al; changes %dx
    movb %al, %ah
    movw $COM1_LSR, %dx
0:  inb %dx, %al
    testb $0x20, %al
    jz 0b
    movb %ah, %al
    movw $COM1, %dx
    outb %al, %dx
    ret

put_string:                             # NUL-terminated at %esi; changes %eax, %edx
    lodsb
    testb %al, %al
    jz 0f
    call put_char
    jmp put_string
0:  ret

put_bytes:                              # %ecx bytes at %esi; changes %eax, %edx
    testl %ecx, %ecx
    jz 0f
    lodsb
    call put_char
    subl $1, %ecx
    jmp put_bytes
0:  ret

put_line_end:
    movb $'\n', %al
    jmp put_char

guest_echo:                             # everything typed comes back; ^D ends
    movl $STACK_TOP, %esp
    load_address %esi, ready_text
    call put_string
echo:
    movw $COM1_LSR, %dx
0:  inb %dx, %al
    testb $1, %al
    jz 0b
    movw $COM1, %dx
    inb %dx, %al
    cmpb $4, %al
    je guest_exit
    call put_char
    jmp echo

guest_nested:                           # enters a guest of its own by VMRUN (APM 2 15.5); it has the same memory, and no exit is wanted
    .set VMCB, 0x200000                 # pages of RAM, which are zero
    .set HOST_SAVE, VMCB + 0x1000
    .set PAGE_DIRECTORY, VMCB + 0x2000  # of the first 4 MiB: KVM wants paging, which SVM does not
    movl $0x80000001, %eax
    cpuid
    testl $4, %ecx
    jnz 0f
    exit NO_SVM
0:  movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $0x1000, %eax                   # SVME
    wrmsr
    movl %eax, VMCB + 0x4d0
    movl $0xc0010117, %ecx              # VM_HSAVE_PA
    movl $HOST_SAVE, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x83, PAGE_DIRECTORY          # one large page at 0, writable
    movl %cr4, %eax
    orl $0x10, %eax                     # PSE
    movl %eax, %cr4
    movl $PAGE_DIRECTORY, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax               # PG
    movl %eax, %cr0
    movl $1, VMCB + 0x10                # the intercept of VMRUN, which must be set
    movl $1, VMCB + 0x58                # the address space's number, which must not be 0
    .irp segment, 0x400, 0x420, 0x430   # ES, SS, DS: flat, 32 bits, writable
    movl $0x0c930010, VMCB + \segment
    movl $-1, VMCB + \segment + 4
    .endr
    movl $0x0c9b0008, VMCB + 0x410      # CS: the same, for code
    movl $-1, VMCB + 0x414
    movl $0x11, VMCB + 0x558            # CR0: protected mode, no paging
    movl $0xffff0ff0, VMCB + 0x568      # DR6 and DR7 as at power-on
    movl $0x400, VMCB + 0x560
    movl $2, VMCB + 0x570               # RFLAGS: no interrupts
    load_address %eax, guest_echo
    movl %eax, VMCB + 0x578             # RIP
    movl $VMCB, %eax
    clgi
    vmrun
    exit 1

guest_early_echo:                       # a line that may come before anything reads it, then a word to the monitor, then echo
    movl $STACK_TOP, %esp
    load_address %esi, early_text
    call put_string
    out_byte PVPANIC, 2
    jmp echo

guest_chatter:                          # 16 KiB
    movl $STACK_TOP, %esp
    movl $1024, %edi
0:  load_address %esi, chatter_text
    call put_string
    subl $1, %edi
    jnz 0b
    exit SUCCESS

ready_text: .asciz "ready\n"
early_text: .asciz "early\n"
chatter_text: .asciz "fifteen letters\n"

# ---- what the boot protocol hands over --------------------------------------------------------------------------
# Three lines: the command line, the first 8 bytes of the RSDP ("none" without ACPI), the initrd. Then power off.

guest_boot_pvh:                         # %ebx: hvm_start_info (xen.git xen/include/public/arch-x86/hvm/start_info.h)
    movl $STACK_TOP, %esp
    cmpl $0x336ec578, (%ebx)            # magic
    movb $10, %al
    jne exit_with_al
    movl 24(%ebx), %esi                 # cmdline_paddr
    call put_string
    call put_line_end
    movl 32(%ebx), %esi                 # rsdp_paddr
    call put_rsdp
    xorl %ecx, %ecx
    cmpl $0, 12(%ebx)                   # nr_modules
    je 1f
    movl 16(%ebx), %edi                 # modlist_paddr
    movl (%edi), %esi                   # its first entry: paddr, then size
    movl 8(%edi), %ecx
1:  call put_bytes
    call put_line_end
    jmp guest_poweroff

put_rsdp:                               # %esi, 0 for none
    testl %esi, %esi
    jz 0f
    movl $8, %ecx
    call put_bytes
    jmp put_line_end
0:  movb $'-', %al
    call put_char
    jmp put_line_end

.code64
guest_boot_linux64:                     # %rsi: boot_params (Documentation/arch/x86/zero-page.rst); position-independent
    movl $STACK_TOP, %esp
    movq %rsi, %rbx
    cmpl $0x53726448, 0x202(%rbx)       # the header's magic, "HdrS"
    movb $11, %al
    jne boot_failed
    movl $0xc0000080, %ecx              # EFER: long mode is active
    rdmsr
    testl $0x400, %eax
    movb $12, %al
    jz boot_failed
    movl 0x228(%rbx), %esi              # cmd_line_ptr
    call put_string
    call put_line_end
    movl 0x70(%rbx), %esi               # acpi_rsdp_addr
    call put_rsdp
    movl 0x218(%rbx), %esi              # ramdisk_image, ramdisk_size
    movl 0x21c(%rbx), %ecx
    call put_bytes
    call put_line_end
    jmp guest_poweroff
boot_failed:
    jmp exit_with_al
.code32

# ---- for a debugger ---------------------------------------------------------------------------------------------
# Entered by the 64-bit Linux protocol. It starts the second vCPU, if there is one, and then counts until a debugger
# writes an exit status. `debugger` in guest.rs knows these addresses.

.set DEBUG_COUNTER, 0x220000
.set DEBUG_STATUS, 0x220008             # not 0: the exit status
.set DEBUG_BREAKS, 0x220018             # not 0: a breakpoint of the guest's own in each round
.set DEBUG_TRAPS, 0x220010              # breakpoints that the guest's handler has seen
.set DEBUG_IDT, 0x221000
.set SECOND_CODE, 0x8000
.set SECOND_COUNTER, 0x8100
.set LAPIC, 0xfee00000

.code64
guest_debugged:
    movl $0x1234, %ebx
    addl $1, %ebx                       # for single steps
    addl $1, %ebx
    movl $STACK_TOP, %esp
    movq $0x83, PAGE_TABLES + 0x3000    # the first 2 MiB again at 1 GiB: present, writable, large
    movq %cr3, %rax
    movq %rax, %cr3
    load_address %eax, debugged_trap    # gate 3 of the interrupt table, in the boot GDT's code segment
    movw %ax, DEBUG_IDT + 48
    movw $0x10, DEBUG_IDT + 50
    movw $0x8e00, DEBUG_IDT + 52
    shrl $16, %eax
    movw %ax, DEBUG_IDT + 54
    movw $0xfff, DEBUG_IDT - 16
    movq $DEBUG_IDT, DEBUG_IDT - 14
    lidt DEBUG_IDT - 16
    movl $0x0006ff66, SECOND_CODE       # incl (SECOND_COUNTER); jmp to that, in real mode
    movl $0x90f9eb81, SECOND_CODE + 4
    movl $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)             # spurious interrupt vector register: enabled
    movl $(1 << 24), 0x310(%rdi)        # to APIC 1: INIT, then SIPI with SECOND_CODE's page
    movl $0x4500, 0x300(%rdi)
    movl $(1 << 24), 0x310(%rdi)
    movl $(0x4600 | SECOND_CODE >> 12), 0x300(%rdi)
    jmp debugged_loop
debugged_trap:
    addl $1, DEBUG_TRAPS
    iretq
    .org guest_debugged + 0x100
debugged_loop:
    addl $1, DEBUG_COUNTER
    movl DEBUG_BREAKS, %eax
    testl %eax, %eax
    jz 0f
    int3
0:  movl DEBUG_STATUS, %eax
    testl %eax, %eax
    jz debugged_loop
    jmp exit_with_al
.code32

guest_wake:                             # an NMI to all other processors, which wait to be started; goes on for some milliseconds
    movl $0xc4400, 0xfee00300           # ICR of the local APIC (SDM 3A 11.6.1): all but this one, NMI
    movl $2000, %ecx
0:  inb $0x80, %al
    subl $1, %ecx
    jnz 0b
    exit SUCCESS

# ---- nothing there ----------------------------------------------------------------------------------------------

guest_unmapped:                         # reads of nothing give ones, writes to nothing do nothing
    movw $0x4321, %dx
    inl %dx, %eax
    cmpl $0xffffffff, %eax
    movb $20, %bl
    jne fail
    outl %eax, %dx
    movl VIRTIO + 0x00800000, %eax
    cmpl $0xffffffff, %eax
    movb $21, %bl
    jne fail
    movl %eax, VIRTIO + 0x00800000
    exit SUCCESS

fail:                                   # %bl: which step
    movb %bl, %al
    jmp exit_with_al

# ---- the first disk ---------------------------------------------------------------------------------------------
# One request at a time: descriptors 0 (header), 1 (data), 2 (status), always from 0, so that the available ring's
# entries stay 0 and only its index moves.

.set QUEUE_SIZE, 8
.set DESCRIPTORS, 0x200000
.set AVAILABLE, 0x201000
.set USED, 0x202000
.set HEADER, 0x203000
.set STATUS, 0x203100
.set DATA, 0x204000

.set CAPACITY, 64                       # sectors that the test's image has
.set FROM_DEVICE, 2                     # VIRTQ_DESC_F_WRITE
.set NO_DATA, -1

.macro require offset, value, step      # a register of the device must hold this
    movl \offset(%ebp), %eax
    cmpl $\value, %eax
    movb $\step, %bl
    jne fail
.endm

.macro require_bit offset, bit, step    # a register of the device must have this bit
    movl \offset(%ebp), %eax
    testl $(1 << \bit), %eax
    movb $\step, %bl
    jz fail
.endm

start_device:                           # virtio 1.2 §3.1.1; leaves the register window in %ebp
    movl $VIRTIO, %ebp
start_device_at_ebp:
    require 0x000, 0x74726976, 30       # MagicValue
    require 0x004, 2, 31                # Version
    require 0x008, 2, 32                # DeviceID: a block device
    movl $0, 0x070(%ebp)                # Status: reset
    movl $1, 0x070(%ebp)                # ACKNOWLEDGE
    movl $3, 0x070(%ebp)                # DRIVER
    movl $1, 0x014(%ebp)                # DeviceFeaturesSel
    require_bit 0x010, 0, 33            # VERSION_1
    movl $0, 0x014(%ebp)
    require_bit 0x010, 9, 34            # BLK_F_FLUSH
    movl $1, 0x024(%ebp)                # DriverFeaturesSel
    movl $1, 0x020(%ebp)                # VERSION_1
    movl $0, 0x024(%ebp)
    movl $0x200, 0x020(%ebp)            # BLK_F_FLUSH
    movl $11, 0x070(%ebp)               # FEATURES_OK
    require 0x070, 11, 35               # ... and it agrees
    movl $0, 0x030(%ebp)                # QueueSel
    movl 0x034(%ebp), %eax              # QueueNumMax
    cmpl $QUEUE_SIZE, %eax
    movb $36, %bl
    jb fail
    movl $QUEUE_SIZE, 0x038(%ebp)       # QueueNum
    movl $DESCRIPTORS, 0x080(%ebp)
    movl $0, 0x084(%ebp)
    movl $AVAILABLE, 0x090(%ebp)
    movl $0, 0x094(%ebp)
    movl $USED, 0x0a0(%ebp)
    movl $0, 0x0a4(%ebp)
    movl $1, 0x044(%ebp)                # QueueReady
    movl $15, 0x070(%ebp)               # DRIVER_OK
    require 0x070, 15, 37
    ret

# %eax type, %edx sector, %ecx flags of the data descriptor or NO_DATA, %esi bytes of data.
# Waits for the answer: %al the status byte, %ecx the used length.
request:
    movl %eax, HEADER
    movl $0, HEADER + 4
    movl %edx, HEADER + 8
    movl $0, HEADER + 12
    movb $0xff, STATUS
    movl $HEADER, DESCRIPTORS           # each: address (8 bytes), length (4), flags (2), next (2)
    movl $16, DESCRIPTORS + 8
    movl $0x00010001, DESCRIPTORS + 12  # next: 1
    movl $DATA, DESCRIPTORS + 16
    movl %esi, DESCRIPTORS + 24
    movl %ecx, %eax
    orl $0x00020001, %eax               # next: 2
    movl %eax, DESCRIPTORS + 28
    movl $STATUS, DESCRIPTORS + 32
    movl $1, DESCRIPTORS + 40
    movl $FROM_DEVICE, DESCRIPTORS + 44
    cmpl $NO_DATA, %ecx
    jne 0f
    movl $0x00020001, DESCRIPTORS + 12
0:  movl AVAILABLE, %edi                # flags (0) and index
    addl $0x10000, %edi
    movl %edi, AVAILABLE
    movl $0, 0x050(%ebp)                # QueueNotify
1:  movl USED, %eax
    cmpl %edi, %eax                     # the same index, and flags 0
    jne 1b
    shrl $16, %edi
    subl $1, %edi
    andl $(QUEUE_SIZE - 1), %edi
    movl USED + 8(,%edi,8), %ecx        # the used element's length
    movb STATUS, %al
    ret

.macro submit type, sector, flags, length, status, used, step
    movl $\type, %eax
    movl $\sector, %edx
    movl $\flags, %ecx
    movl $\length, %esi
    call request
    movb $\step, %bl
    cmpb $\status, %al
    jne fail
    movb $(\step + 1), %bl
    cmpl $\used, %ecx
    jne fail
.endm

fill_data:                              # 128 words from %eax up
    movl $DATA, %edi
0:  movl %eax, (%edi)
    addl $4, %edi
    addl $1, %eax
    cmpl $(DATA + 512), %edi
    jne 0b
    ret

check_data:                             # the same, or fail with %bl
    movl $DATA, %edi
0:  cmpl %eax, (%edi)
    jne fail
    addl $4, %edi
    addl $1, %eax
    cmpl $(DATA + 512), %edi
    jne 0b
    ret

guest_disk:
    movl $STACK_TOP, %esp
    call start_device
    require 0x100, CAPACITY, 40         # config: capacity
    require 0x104, 0, 40

    submit 0, 3, FROM_DEVICE, 512, 0, 513, 50   # read what the test put there
    movl $0x5a000000, %eax
    movb $52, %bl
    call check_data

    movl $0xc3000000, %eax              # write, make durable, read back
    call fill_data
    submit 1, 7, 0, 512, 0, 1, 53
    submit 4, 0, NO_DATA, 0, 0, 1, 55
    movl $0, %eax
    call fill_data
    submit 0, 7, FROM_DEVICE, 512, 0, 513, 57
    movl $0xc3000000, %eax
    movb $59, %bl
    call check_data

    submit 0, CAPACITY, FROM_DEVICE, 512, 1, 1, 60  # past the end: IOERR, and no data
    submit 1, CAPACITY, 0, 512, 1, 1, 62
    submit 99, 0, NO_DATA, 0, 2, 1, 64  # unknown: UNSUPP

    submit 8, 0, FROM_DEVICE, 20, 0, 21, 66     # the serial number, printed
    movl $DATA, %esi
    movb $0, DATA + 20
    call put_string
    call put_line_end

    require 0x060, 1, 70                # InterruptStatus: used buffer
    movl $1, 0x064(%ebp)                # InterruptACK: where the registers are mapped, this write alone causes no exit
    movl $3, 0x064(%ebp)                # ... but any other
    require 0x060, 0, 71
    movl $0, 0x070(%ebp)                # a reset, and it works again
    require 0x070, 0, 72
    movl $0, AVAILABLE
    movl $0, USED
    call start_device
    submit 0, 3, FROM_DEVICE, 512, 0, 513, 73
    movl $0x5a000000, %eax
    movb $75, %bl
    call check_data
    exit SUCCESS

guest_disks:                            # writes words from the address of its registers up to the first sector of each disk
    movl $STACK_TOP, %esp
    movl $VIRTIO, %ebp
next_disk:
    movl $0, AVAILABLE
    movl $0, USED
    call start_device_at_ebp
    movl %ebp, %eax
    call fill_data
    submit 1, 0, 0, 512, 0, 1, 76
    movl $0, 0x070(%ebp)                # Status: reset, after which the rings are the next disk's
0:  cmpl $0, 0x070(%ebp)
    jne 0b
    addl $0x1000, %ebp
    cmpl $0x74726976, (%ebp)            # MagicValue, or ones behind the last disk
    je next_disk
    exit SUCCESS

guest_job:                              # the second disk has --exec's script, which begins with "mark='", 34 bytes and "'"
    movl $STACK_TOP, %esp
    movl $(VIRTIO + 0x1000), %ebp
    call start_device_at_ebp
    submit 0, 0, FROM_DEVICE, 512, 0, 513, 90
    movl $(DATA + 512), %edi            # all byte values, as a terminal driver prints them: a newline becomes two bytes
    movl $0, %ecx
0:  cmpb $'\n', %cl
    jne 1f
    movb $'\r', (%edi)
    addl $1, %edi
1:  movb %cl, (%edi)
    addl $1, %edi
    addl $1, %ecx
    cmpl $256, %ecx
    jne 0b
    movw $COM2, %dx
    call put_mark
    load_address %esi, job_begin
    movl $8, %ecx
    rep outsb
    movl $0x800, %ebx
2:  movl $(DATA + 512), %esi
    movl $257, %ecx
    rep outsb
    subl $1, %ebx
    jnz 2b
    call put_mark
    load_address %esi, job_end
    movl $6, %ecx
    rep outsb
    jmp guest_reset                     # too late: the status is known

put_mark:
    movl $(DATA + 6), %esi
    movl $34, %ecx
    rep outsb
    ret

job_begin: .ascii "begin;\r\n"
job_end: .ascii "end 7;"

guest_second_port:
    movl $STACK_TOP, %esp
    movw $COM2, %dx
    load_address %esi, second_text
    movl $7, %ecx
    rep outsb
    jmp guest_echo
second_text: .ascii "second\n"

guest_disk_sync:                        # as disk_load, with a flush after each write and before its dot
    movl $1, flush_each - guest_start + GUEST_BASE
guest_disk_load:                        # writes sector after sector, each full of words from its number up; a dot for each
    movl $STACK_TOP, %esp
    call start_device
0:  movl sector - guest_start + GUEST_BASE, %eax
    call fill_data
    movl $1, %eax
    movl sector - guest_start + GUEST_BASE, %edx
    movl $0, %ecx
    movl $512, %esi
    call request
    movb $80, %bl
    cmpb $0, %al
    jne fail
    cmpl $0, flush_each - guest_start + GUEST_BASE
    je 1f
    movl $4, %eax                       # VIRTIO_BLK_T_FLUSH
    movl $0, %edx
    movl $NO_DATA, %ecx
    call request
    movb $81, %bl
    cmpb $0, %al
    jne fail
1:  movb $'.', %al
    call put_char
    movl sector - guest_start + GUEST_BASE, %eax
    addl $1, %eax
    movl %eax, sector - guest_start + GUEST_BASE
    cmpl 0x100(%ebp), %eax              # config: capacity
    jb 0b
    exit SUCCESS
.balign 4
sector: .long 0
flush_each: .long 0

# Each of these has to be as at power-on, and is something else afterwards.
guest_reborn:                           # checks that nothing is left of a life before; prints "ready"; then as disk_load
    movl $STACK_TOP, %esp
    cmpl $0, AVAILABLE                  # RAM
    movb $90, %bl
    jne fail
    movl %dr0, %eax                     # debug registers
    testl %eax, %eax
    movb $91, %bl
    jnz fail
    movl $0x1234, %eax
    movl %eax, %dr0
    movl %cr4, %eax                     # special registers
    testl %eax, %eax
    movb $92, %bl
    jnz fail
    movl $8, %eax                       # debugging extensions
    movl %eax, %cr4
    movl $0xc0000102, %ecx              # MSRs: IA32_KERNEL_GS_BASE
    rdmsr
    orl %edx, %eax
    movb $93, %bl
    jnz fail
    movl $0x5000, %eax
    wrmsr
    movl 0xfee000f0, %eax               # local APIC: spurious interrupt vector register
    cmpl $0xff, %eax
    movb $94, %bl
    jne fail
    movl $0x1ff, 0xfee000f0
    inb $0x21, %al                      # 8259: mask
    testb %al, %al
    movb $95, %bl
    jnz fail
    movb $0x5a, %al
    outb %al, $0x21
    movw $(COM1 + 7), %dx               # UART: scratch register
    inb %dx, %al
    testb %al, %al
    movb $96, %bl
    jnz fail
    movb $0x5a, %al
    outb %al, %dx
    movl $VIRTIO, %ebp
    require 0x070, 0, 97                # the disk: Status
    require 0x060, 0, 98                # InterruptStatus
    require 0x044, 0, 99                # QueueReady
    load_address %esi, ready_text
    call put_string
    jmp guest_disk_load

# ---- much memory in use -----------------------------------------------------------------------------------------

.set FILL_START, 0x1000000
.set FILL_END, 0x9000000
.set REFILL_END, 0x2000000

guest_fill:                             # a word that is not 0 in each page, then lines of a dot; when typed at, other words, and a plus
    movl $STACK_TOP, %esp
    movl $FILL_START, %edi
0:  movl %edi, (%edi)
    addl $0x1000, %edi
    cmpl $FILL_END, %edi
    jne 0b
    movw $(COM1 + 1), %dx               # IER: received data; a port that only prints gets no input
    movb $1, %al
    outb %al, %dx
1:  movb $'.', %al
2:  call put_char
    call put_line_end
    movw $COM1_LSR, %dx
    inb %dx, %al
    testb $1, %al
    jz 1b
    movw $COM1, %dx
    inb %dx, %al
    movl $FILL_START, %edi
3:  incl (%edi)
    addl $0x1000, %edi
    cmpl $REFILL_END, %edi
    jne 3b
    movb $'+', %al
    jmp 2b

guest_count:                            # counts at both ends of its memory, and prints a dot now and then
    movl $STACK_TOP, %esp
0:  movl $0x1000, %ecx
1:  incl COUNT_LOW
    incl COUNT_HIGH
    decl %ecx
    jnz 1b
    movb $'.', %al
    call put_char
    jmp 0b

# ---- much at once -----------------------------------------------------------------------------------------------
# 256 reads of 4080 MiB each: every descriptor of the queue refers to one indirect table, whose 1020 data buffers are one
# buffer of 4 MiB. What a guest with 32 MiB of RAM can ask of a device at most.

.set FLOOD_SIZE, 256                    # requests, and entries of the queue
.set FLOOD_TABLE, 0x300000              # 1022 descriptors
.set FLOOD_BUFFERS, 1020
.set FLOOD_BUFFER, 0x800000
.set FLOOD_BUFFER_SIZE, 0x400000

start_flood_device:                     # as start_device, with INDIRECT_DESC and a longer queue
    movl $VIRTIO, %ebp
    movl $0, 0x070(%ebp)                # Status: reset
    movl $3, 0x070(%ebp)                # ACKNOWLEDGE, DRIVER
    movl $1, 0x024(%ebp)                # DriverFeaturesSel
    movl $1, 0x020(%ebp)                # VERSION_1
    movl $0, 0x024(%ebp)
    movl $(1 << 28 | 1 << 9), 0x020(%ebp)   # INDIRECT_DESC, BLK_F_FLUSH
    movl $11, 0x070(%ebp)               # FEATURES_OK
    require 0x070, 11, 38
    movl $0, 0x030(%ebp)                # QueueSel
    movl $FLOOD_SIZE, 0x038(%ebp)       # QueueNum
    movl $DESCRIPTORS, 0x080(%ebp)
    movl $0, 0x084(%ebp)
    movl $AVAILABLE, 0x090(%ebp)
    movl $0, 0x094(%ebp)
    movl $USED, 0x0a0(%ebp)
    movl $0, 0x0a4(%ebp)
    movl $1, 0x044(%ebp)                # QueueReady
    movl $15, 0x070(%ebp)               # DRIVER_OK
    require 0x070, 15, 39
    ret

post_flood:
    movl $0, HEADER                     # a read
    movl $0, HEADER + 8                 # from sector 0
    movl $0, HEADER + 12
    movl $FLOOD_TABLE, %edi             # address, (high half), length, flags and next << 16
    movl $HEADER, (%edi)
    movl $16, 8(%edi)
    movl $0x00010001, 12(%edi)
    movl $2, %ecx
0:  addl $16, %edi
    movl $FLOOD_BUFFER, (%edi)
    movl $FLOOD_BUFFER_SIZE, 8(%edi)
    movl %ecx, %eax
    shll $16, %eax
    orl $(1 | FROM_DEVICE), %eax
    movl %eax, 12(%edi)
    addl $1, %ecx
    cmpl $(FLOOD_BUFFERS + 2), %ecx
    jne 0b
    addl $16, %edi
    movl $STATUS, (%edi)
    movl $1, 8(%edi)
    movl $FROM_DEVICE, 12(%edi)
    movl $0, %ecx
1:  movl %ecx, %edi
    shll $4, %edi
    movl $FLOOD_TABLE, DESCRIPTORS(%edi)
    movl $(16 * (FLOOD_BUFFERS + 2)), DESCRIPTORS + 8(%edi)
    movl $4, DESCRIPTORS + 12(%edi)     # VIRTQ_DESC_F_INDIRECT
    movw %cx, AVAILABLE + 4(,%ecx,2)
    addl $1, %ecx
    cmpl $FLOOD_SIZE, %ecx
    jne 1b
    movw $FLOOD_SIZE, AVAILABLE + 2
    movl $0, 0x050(%ebp)                # QueueNotify
    ret

guest_flood:                            # posts them, prints "ready", and spins
    movl $STACK_TOP, %esp
    call start_flood_device
    call post_flood
    load_address %esi, ready_text
    call put_string
    jmp guest_spin

guest_flood_reset:                      # the same; then resets the device, prints "reset" when Status reads 0, and spins
    movl $STACK_TOP, %esp
    call start_flood_device
    call post_flood
    load_address %esi, ready_text
    call put_string
    movl $0, 0x070(%ebp)
0:  cmpl $0, 0x070(%ebp)
    jne 0b
    load_address %esi, reset_text
    call put_string
    jmp guest_spin
reset_text: .asciz "reset\n"

guest_reset_storm:                      # a read, kicks without a chain, a reset without end; a dot for each round
    movl $STACK_TOP, %esp
    movl $VIRTIO, %ebp
0:  movl $0, 0x070(%ebp)                # Status: reset, after which the rings are the guest's
    movl $0, AVAILABLE
    movl $0, USED
    call start_device
    submit 0, 0, FROM_DEVICE, 512, 0, 513, 100
    movl $64, %ecx
1:  movl $0, 0x050(%ebp)                # QueueNotify
    subl $1, %ecx
    jnz 1b
    movb $'.', %al
    call put_char
    jmp 0b
