# `make run` and `make test` install and prepare what they need.

CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
MINIVMM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/minivmm
export CARGO_TARGET_DIR MINIVMM_CACHE

comma := ,
MINIVMM := $(CARGO_TARGET_DIR)/release/minivmm
# The demo's copy of its root disk: what the guest writes stays until `make clean`.
DEMO := $(CARGO_TARGET_DIR)/demo

# Where the CPU cannot run a Linux guest, the lab's emulated CPU can.
ifeq ($(shell grep -m 1 -owE 'vmx|svm' /proc/cpuinfo),)
LAB := resources/lab
ANNOUNCE = @echo 'This CPU does not support hardware virtualization (no vmx or svm flag): running $(1) in the lab, on an emulated CPU that does.'
endif

PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: help build install run guest lab book exits test test-scripts test-unit test-guests test-tools soak fuzz model sanitize bench bench-before bench-compare instructions bench-tools fmt lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

# Without a dynamic loader it starts 0.4 ms sooner, and has no pages of the C library but those that it needs. Where the C library's
# static form is missing (some distributions have it in a package of its own), the binary is linked dynamically.
STATIC := $(if $(filter /%,$(shell cc -print-file-name=libc.a)),-C target-feature=+crt-static -C link-arg=-Wl$(comma)-z$(comma)pack-relative-relocs)
build: ## the binary: target/release/minivmm
	$(CARGO) rustc --release -p minivmm --bin minivmm -- $(STATIC)

# Made from the definition of the command line.
GENERATED = $(CARGO_TARGET_DIR)/install
install: build ## the binary, man pages, completions and a systemd unit, to PREFIX=/usr/local (below DESTDIR=)
	$(CARGO) run -q -p minivmm --example install_files -- $(GENERATED)
	install -D -m 755 $(MINIVMM) $(DESTDIR)$(PREFIX)/bin/minivmm
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 $(GENERATED)/minivmm.1 $(GENERATED)/minivmm-ctl.1 $(GENERATED)/minivmm-powercut.1 $(GENERATED)/minivmm-replay.1 $(GENERATED)/minivmm-trace-view.1
	install -D -m 644 $(GENERATED)/minivmm.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/minivmm
	install -D -m 644 $(GENERATED)/_minivmm $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_minivmm
	install -D -m 644 $(GENERATED)/minivmm.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/minivmm.fish
	mkdir -p $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's,@PREFIX@,$(PREFIX),' resources/install/minivmm@.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/minivmm@.service

run: terminal demo build ## a guest with a virtio disk, and its shell
	@mkdir -p $(DEMO) && cp -u --sparse=always $(MINIVMM_CACHE)/demo.img $(DEMO)/root.img
	$(call ANNOUNCE,the guest)
	@$(if $(LAB),$(LAB) -o $(DEMO) --) $(MINIVMM) --kernel $(MINIVMM_CACHE)/linux-cloud/vmlinux \
		--initrd $(MINIVMM_CACHE)/initrd-cloud.cpio --disk $(DEMO)/root.img --cmdline loglevel=3

# First: who has none should not wait for a build before learning that.
.PHONY: terminal
terminal:
	@[ -t 0 ] && [ -t 1 ] || { echo "make run: the guest's shell needs a terminal, but standard input or output is not one;" \
		"without a terminal, use 'make build' and $(MINIVMM)" >&2; exit 1; }

.PHONY: demo
demo:
	@resources/prepare linux-cloud initrd-cloud.cpio demo.img

guest: demo ## only the guests' kernels and disks, in ~/.cache/minivmm
	@resources/prepare linux-amd64 initrd-amd64.cpio initrd-amd64-cmdline.cpio linux-backports initrd-backports.cpio tools.img debian

lab: ## make lab CMD='...': a command on a machine whose /dev/kvm works (CMD=bash for a look around)
	@resources/lab -- bash -c '$(or $(CMD),$(error usage: make lab CMD='...'))'

book: ## the chapters as a book with search: target/book/html/index.html
	@resources/book/build
	@echo "file://$(CARGO_TARGET_DIR)/book/html/index.html"

exits: ## what each kind of VM exit costs on this machine
	@$(CARGO) run -q --release -p minivmm-tests --bin exits

# The guests first: an unreachable package archive or a missing linker shows early.
test: guest test-scripts test-unit test-guests ## all tests

test-scripts: ## resources/prepare with a simulated package archive, in seconds
	@resources/test-scripts

test-unit: test-tools ## units, hostile input, small polling guests
	$(CARGO) test --workspace --no-fail-fast

# MINIVMM_SOAK=1 makes the tests of random moments and of power cuts run in full. The test of VMs that live on has no end of its own.
soak: test-tools ## the long tests: VMs under mixed load for T=60 (s, 10m, 1h), ends at random moments, power cuts (ONLY=lives: the first)
	MINIVMM_SOAK=1 MINIVMM_SOAK_TIME=$(T) $(CARGO) test -p minivmm --test lives -- --nocapture
	$(if $(ONLY),,MINIVMM_SOAK=1 $(CARGO) test --workspace --no-fail-fast -- --nocapture)

# TARGET=devices/block: only that one. PACK=1: what was found becomes the corpus.
T ?= 60
fuzz: test-tools ## fuzz each target for T=60 seconds, with coverage (tests/docs/fuzzing.md)
	@resources/fuzz -t $(T) $(if $(PACK),--pack) $(TARGET)

model: ## driver and device in every order that the memory model allows (loom), and long sequences of events at a worker
	LOOM_MAX_PREEMPTIONS=3 RUSTFLAGS='--cfg loom' $(CARGO) test --target-dir $(CARGO_TARGET_DIR)/model -p devices --lib virtio::model::
	MINIVMM_SOAK=1 $(CARGO) test -p devices --lib exhaustive:: -- --nocapture

sanitize: test-tools ## the unit tests under AddressSanitizer and ThreadSanitizer
	@resources/sanitize

# What tests judge the results by. The lab's packages first: apt removes a qemu-utils that is newer than they are.
test-tools:
	@bash -c '. resources/packages.sh && $(if $(LAB),need kmod qemu-system-x86 &&) need btrfs-progs crun e2fsprogs gdb golang-github-containers-common nbd-client nbdkit qemu-utils sqlite3 strace xfsprogs'

# $(call executable,NAME,CARGO'S OPTIONS): the test program NAME, as cargo names it after building
executable = $$($(CARGO) test --workspace $(2) --no-run --message-format=json 2>/dev/null | sed -n 's|.*"executable":"\([^"]*/$(1)-[^"]*\)".*|\1|p')
# Seconds until a lab that hangs is ended. Each test has a bound of its own, so that this one is for the lab's own faults.
LAB_LIMIT ?= 4500

# In labs that share the tests: first a stock Debian, with no guest beside it; the devices' SCSI tests with them, since a lab's kernel has scsi_debug. The binary under test
# is the release; the tests themselves are built as the other tests are.
test-guests: guest build test-tools ## real Linux guests, and a stock Debian (TESTS=NAME: only some)
	$(CARGO) test --workspace --test guests --no-run
	$(if $(TESTS),,$(CARGO) test --workspace --lib --no-run)
	$(call ANNOUNCE,the guests)
	@MINIVMM_BIN=$(MINIVMM) $(if $(LAB),resources/labs $(LAB_LIMIT)) resources/guest-tests $(if $(LAB),--share {}) \
		$(if $(TESTS),"$(call executable,guests,--test guests) $(TESTS)",\
		"$(call executable,guests,--test guests) debian::" "$(call executable,guests,--test guests) --skip debian::" \
		"$(call executable,devices,--lib) scsi")

# QUICK=1: once, and only on a file in memory. Results, and a picture of them, are in target/bench.
BENCH = $(CARGO_TARGET_DIR)/release/bench
SPEED := $(if $(QUICK),--quick)

bench: bench-tools build ## speed beside QEMU's microvm and the host: polling and Linux guests (QUICK=1: less)
	@resources/prepare linux-small initrd-small.cpio linux-cloud initrd-cloud.cpio tools.img
	$(CARGO) build --release -p minivmm-tests --bin bench
	@mkdir -p $(CARGO_TARGET_DIR)/bench
	$(BENCH) driver $(SPEED)
	$(BENCH) native $(SPEED)
	$(BENCH) options $(SPEED)
	$(BENCH) saved $(SPEED)
	chrt -o 0 $(BENCH) scale $(SPEED)
	$(call ANNOUNCE,the Linux guests)
	$(if $(LAB),$(LAB) -c $$(nproc) -o $(CARGO_TARGET_DIR)/bench -- )$(BENCH) guests $(SPEED)
	$(if $(LAB),$(LAB) -o $(CARGO_TARGET_DIR)/bench -- )$(BENCH) clones $(SPEED)
	@$(BENCH) report

bench-compare: ## the last `make bench` beside the one before it, or beside WITH=results.json
	@$(BENCH) compare $(WITH)

# Another commit's minivmm takes turns with this one's in the polling guest, beside QEMU. With real-time priority where that is
# allowed, since any other load decides the result.
BEFORE_DIR = $(CARGO_TARGET_DIR)/before
bench-before: bench-tools build ## the polling guest, this minivmm and BEFORE=COMMIT's in turn (REPETITIONS=9)
	@rm -rf $(BEFORE_DIR)/source && mkdir -p $(BEFORE_DIR)/source $(CARGO_TARGET_DIR)/bench
	git archive $(or $(BEFORE),$(error usage: make bench-before BEFORE=COMMIT)) | tar -x -C $(BEFORE_DIR)/source
	$(MAKE) -C $(BEFORE_DIR)/source CARGO_TARGET_DIR=$(BEFORE_DIR)/target build
	$(CARGO) build --release -p minivmm-tests --bin bench
	MINIVMM_BEFORE=$(BEFORE_DIR)/target/release/minivmm $(shell chrt -r 5 true 2>/dev/null && echo chrt -r 5) \
		$(BENCH) native --quick --repetitions=$(or $(REPETITIONS),9)
	@$(BENCH) report

instructions: ## instructions that a request of 4 KiB costs the worker, counted by callgrind
	@resources/count-instructions

bench-tools:
	@bash -c '. resources/packages.sh && need e2fsprogs fio qemu-system-x86'

fmt: ## format the sources
	$(CARGO) fmt --all

lint: ## formatting, clippy, documentation, dependencies, scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --workspace --test guests -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps
	resources/check-dependencies
	resources/check-scripts

clean: ## remove target/, but not the cache
	$(CARGO) clean
