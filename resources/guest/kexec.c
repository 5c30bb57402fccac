/* kexec KERNEL INITRD WORDS: start another kernel in place of this one, at once (kexec_file_load(2), reboot(2)).
 *
 * Freestanding, as outb.c is. Debian's kexec needs a library of Xen's, which no test host has.
 */

static long syscall5(long number, long a, long b, long c, const void *d, long e)
{
	register const void *fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = e;
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
			 : "rcx", "r11", "memory");
	return result;
}

static long open_file(const char *path)
{
	return syscall5(2 /* open */, (long)path, 0 /* O_RDONLY */, 0, 0, 0);
}

__attribute__((used)) static void run(long *stack) /* argc, argv[0], ... */
{
	char **argv = (char **)(stack + 1);
	long length = 0, status = 2;
	if (stack[0] == 4) {
		while (argv[3][length++])
			;
		status = syscall5(320 /* kexec_file_load */, open_file(argv[1]), open_file(argv[2]), length, argv[3], 0) ? 1 : 0;
		if (!status)
			status = syscall5(169 /* reboot */, 0xfee1dead, 672274793, 0x45584543 /* KEXEC */, 0, 0) ? 1 : 0;
	}
	syscall5(60 /* exit */, status, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
