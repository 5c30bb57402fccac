# `make run` and `make test` are all one needs; they install and prepare what is missing.

CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
MINIVMM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/minivmm
export CARGO_TARGET_DIR MINIVMM_CACHE

MINIVMM := $(CARGO_TARGET_DIR)/release/minivmm
# The demo's own copy of its root disk: what the guest writes stays until `make clean`.
DEMO := $(CARGO_TARGET_DIR)/demo

# Where the processor cannot run a guest, the lab's can.
ifeq ($(shell grep -m 1 -owE 'vmx|svm' /proc/cpuinfo),)
LAB := resources/lab
ANNOUNCE = @echo 'This processor lends no virtualisation (no vmx or svm flag): running $(1) in the lab, an emulated one that does.'
endif

.PHONY: help build run guest lab test test-unit test-guests test-tools bench bench-compare bench-tools fmt lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

build: ## the binary: target/release/minivmm
	$(CARGO) build --release -p minivmm

run: demo build ## a guest with a virtio disk, and its shell
	@mkdir -p $(DEMO) && cp -u --sparse=always $(MINIVMM_CACHE)/demo.img $(DEMO)/root.img
	$(call ANNOUNCE,the guest)
	@$(if $(LAB),$(LAB) -o $(DEMO) --) $(MINIVMM) --kernel $(MINIVMM_CACHE)/linux-cloud/vmlinux \
		--initrd $(MINIVMM_CACHE)/initrd-cloud.cpio --disk $(DEMO)/root.img --cmdline loglevel=3

.PHONY: demo
demo:
	@resources/prepare linux-cloud initrd-cloud.cpio demo.img

guest: demo ## only the guests' kernels and disks, in ~/.cache/minivmm
	@resources/prepare linux-amd64 initrd-amd64.cpio initrd-amd64-cmdline.cpio tools.img debian

lab: ## make lab CMD='...': a command on a machine whose /dev/kvm works (CMD=bash for a look around)
	@resources/lab -- bash -c '$(or $(CMD),$(error usage: make lab CMD='...'))'

# The guests first: an unreachable package archive or a missing linker is better known early.
test: guest test-unit test-guests ## all tests

test-unit: test-tools ## units, hostile input, small polling guests
	$(CARGO) test --workspace --no-fail-fast

# What tests judge the results by. The lab's packages first: apt removes a qemu-utils that is newer than they are.
test-tools:
	@bash -c '. resources/packages.sh && $(if $(LAB),need kmod qemu-system-x86 &&) need e2fsprogs qemu-utils strace'

SUITE = $(CARGO) test --release -p minivmm-tests --test guests --no-run

test-guests: guest build test-tools ## real Linux guests, and a stock Debian
	$(SUITE)
	$(call ANNOUNCE,the guests)
	@$(LAB:lab=lab-tests) $$($(SUITE) --message-format=json 2>/dev/null | sed -n 's|.*"executable":"\([^"]*/guests-[^"]*\)".*|\1|p') $(TESTS)

# QUICK=1: once, and only on a file in memory. Results, and a picture of them, are in target/bench.
BENCH = $(CARGO_TARGET_DIR)/release/bench
SPEED := $(if $(QUICK),--quick)

bench: bench-tools build ## speed beside QEMU's microvm and the host: polling and Linux guests (QUICK=1: less)
	@resources/prepare linux-small initrd-small.cpio tools.img
	$(CARGO) build --release -p minivmm-tests --bin bench
	@mkdir -p $(CARGO_TARGET_DIR)/bench
	$(BENCH) driver $(SPEED)
	$(BENCH) native $(SPEED)
	$(call ANNOUNCE,the Linux guests)
	$(if $(LAB),$(LAB) -c 2 -o $(CARGO_TARGET_DIR)/bench -- )$(BENCH) guests $(SPEED)
	@$(BENCH) report

bench-compare: ## the last `make bench` beside the one before it, or beside WITH=results.json
	@$(BENCH) compare $(WITH)

bench-tools:
	@bash -c '. resources/packages.sh && need e2fsprogs fio qemu-system-x86'

fmt: ## format the sources
	$(CARGO) fmt --all

lint: ## formatting, clippy, documentation, dependencies, scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy -p minivmm-tests --test guests -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps
	resources/check-dependencies
	resources/check-scripts

clean: ## remove target/, but not the cache
	$(CARGO) clean
