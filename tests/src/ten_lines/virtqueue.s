virtqueue:                              # reads the first sector of the first disk, and prints it up to the first zero byte
    movl $0xd0000000, %ebp              # the first disk's registers (virtio 1.2 §4.2.2)
    movl $0, 0x070(%ebp)                # Status: reset
    movl $3, 0x070(%ebp)                # Status: ACKNOWLEDGE, DRIVER
    movl $1, 0x024(%ebp)                # DriverFeaturesSel: features 32 to 63
    movl $1, 0x020(%ebp)                # DriverFeatures: VERSION_1, and no other
    movl $11, 0x070(%ebp)               # Status: and FEATURES_OK
    movl $4, 0x038(%ebp)                # QueueNum: the rings have room for 4
    movl $(descriptors - guest_start + GUEST_BASE), 0x080(%ebp)
    movl $(available - guest_start + GUEST_BASE), 0x090(%ebp)
    movl $(used - guest_start + GUEST_BASE), 0x0a0(%ebp)
    movl $1, 0x044(%ebp)                # QueueReady
    movl $15, 0x070(%ebp)               # Status: and DRIVER_OK
    movl $0, 0x050(%ebp)                # QueueNotify: queue 0 has a request
wait_for_used:
    cmpw $1, used + 2 - guest_start + GUEST_BASE
    jne wait_for_used
    movl $(sector_data - guest_start + GUEST_BASE), %esi
    movl $STACK_TOP, %esp
    call put_string
    jmp guest_poweroff

.balign 16
descriptors:                            # address, length, flags (1: one more follows, 2: the device writes), the next one
    .quad request_header - guest_start + GUEST_BASE
    .long 16
    .word 1, 1
    .quad sector_data - guest_start + GUEST_BASE
    .long 512
    .word 3, 2
    .quad request_status - guest_start + GUEST_BASE
    .long 1
    .word 2, 0
    .space 16                           # the fourth is unused
available: .word 0, 1, 0, 0, 0, 0, 0    # flags; the index: one chain so far; its first descriptor
.balign 4
used: .space 6 + 4 * 8                  # the device counts up the index behind the flags
.balign 8
request_header: .long 0, 0              # VIRTIO_BLK_T_IN; reserved
    .quad 0                             # the first sector
request_status: .byte 0xff
sector_data: .space 512
