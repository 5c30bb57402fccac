/* outb PORT VALUE: write a byte to an I/O port (Debian's cloud kernel has no /dev/port).
 *
 * Freestanding, so that it needs neither libc's headers nor its start-up code: 1 KiB in an initrd.
 */

static long syscall1(long number, long argument)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(argument) : "rcx", "r11", "memory");
	return result;
}

static unsigned number(const char *s)
{
	unsigned base = 10, value = 0;
	if (s[0] == '0' && s[1] == 'x')
		base = 16, s += 2;
	for (; *s; s++)
		value = value * base + (*s <= '9' ? *s - '0' : (*s | 32) - 'a' + 10);
	return value;
}

__attribute__((used)) static void run(long *stack) /* argc, argv[0], ... */
{
	char **argv = (char **)(stack + 1);
	long status = 2;
	if (stack[0] == 3) {
		status = syscall1(172 /* iopl */, 3) ? 1 : 0;
		if (!status)
			__asm__ volatile("outb %0, %1" : : "a"((unsigned char)number(argv[2])),
					 "Nd"((unsigned short)number(argv[1])));
	}
	syscall1(60 /* exit */, status);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
