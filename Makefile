# Everything here does its own set-up and can be repeated. `make help` tells what there is.

SHELL := bash
.DEFAULT_GOAL := help

# How long the lab may take, in seconds.
LAB_DEADLINE ?= 2400
SOAK_DEADLINE ?= 7200

CARGO ?= cargo
SKIPPED := $(CURDIR)/target/skipped-tests
SAY_SKIPPED = sort -u $(SKIPPED) | cut -f 1 | uniq -c | while read -r count reason; do \
    echo "SKIPPED: $$count tests: $$reason"; done
RELEASE := target/release
# What `make bench` compares with: QEMU 11.1 where `make peer` has fetched it, for it is a vfio-user client.
PEER_CLOUD_HYPERVISOR ?=
PEER_QEMU ?= $(firstword $(wildcard target/lab/qemu-peer/qemu) $(shell command -v qemu-system-x86_64))
# The guest that it boots where KVM can run Linux, and the device of the host that it gives to one.
LINUX_KERNEL ?= $(wildcard target/lab/kernels/6.12/vmlinuz)
LINUX_INITRAMFS ?= $(wildcard target/lab/images/initramfs-6.12.cpio)
VFIO_DEVICE ?=
PROGRAMS := --package vmm --bin outrigger --package tests --bin lab-cases

.PHONY: help demo test test-iommufd unit unit-tests lab soak vf peer setup programs bench bench-lab lint clean

help: ## Shows this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: programs ## Boots a stock Debian kernel from a disk and shows the guest using a vfio-user device
	@tests/lab/demo.sh

# The tests of network cards need a package, too.
test: setup unit lab vf peer ## Runs every test: unit, property, tiny guests on /dev/kvm, and Linux guests in the lab and in QEMU

test-iommufd: programs ## Builds a kernel with iommufd, once, and runs the cases of the host's devices in a lab with it
	@tests/lab/iommufd.sh
	@tests/lab/debian-image.sh
ifndef CASES
	@LAB_HOST=iommufd LAB_PARAMETERS=nointremap tests/lab/run.sh 120 $(RELEASE)/lab-cases no-remapping
endif
	@LAB_HOST=iommufd tests/lab/run.sh $(LAB_DEADLINE) $(RELEASE)/lab-cases \
	    $(or $(CASES),iommufd passthrough backend refusals vfio no-initramfs)

unit: ## Runs the tests that need no Linux guest
	@mkdir -p target && : >$(SKIPPED)
	SKIPPED_TESTS=$(SKIPPED) $(CARGO) test --workspace --locked
	@$(SAY_SKIPPED)

lab: programs unit-tests ## Runs the cases that boot Linux guests
	@tests/lab/mtty.sh
	@tests/lab/debian-image.sh
ifndef CASES
	@LAB_PARAMETERS=intel_iommu=off tests/lab/run.sh 120 $(RELEASE)/lab-cases no-iommu
	@LAB_PARAMETERS=nointremap tests/lab/run.sh 120 $(RELEASE)/lab-cases no-remapping
endif
	@tests/lab/run.sh $(LAB_DEADLINE) $(RELEASE)/lab-cases $(if $(SEED),--seed $(SEED)) $(CASES)

soak: programs ## Has migrations fail, and kills disks' servers while guests write; COUNT= how many, SEED= repeats a run
	@seed=$(or $(SEED),$$(date +%s)); \
	COUNT=$(or $(COUNT),200) SEED=$$seed $(CARGO) test --package tests --locked --test migration_faults -- --nocapture && \
	tests/lab/run.sh $(SOAK_DEADLINE) $(RELEASE)/lab-cases --soak $(or $(COUNT),200) --seed $$seed

vf: programs ## Gives a guest a virtual function of a network card, in a lab that QEMU 11.1 runs
	@if tests/lab/qemu-peer.sh; then \
	    LAB_QEMU=target/lab/qemu-peer/qemu tests/lab/run.sh $(LAB_DEADLINE) $(RELEASE)/lab-cases virtual-function; \
	else \
	    echo "SKIPPED: a virtual function in a guest: QEMU 11.1, whose lab has one, cannot be fetched"; \
	fi

peer: setup ## Boots Linux guests with the built-in devices in QEMU 11.1, a vfio-user client that nobody here wrote
	@if tests/lab/qemu-peer.sh; then \
	    : >$(SKIPPED); \
	    SKIPPED_TESTS=$(SKIPPED) $(CARGO) test --package tests --test qemu_client --locked -- --ignored && $(SAY_SKIPPED); \
	else \
	    echo "SKIPPED: the built-in devices in QEMU 11.1, which cannot be fetched"; \
	fi

setup: ## Fetches what the lab needs: packages, kernels, initramfs images
	@tests/lab/setup.sh

programs: setup
	$(CARGO) build --release --locked $(PROGRAMS)

# Those of the machine, as a program for the lab.
unit-tests: setup
	@program=$$($(CARGO) test --package vmm --lib --no-run --locked --message-format=json-render-diagnostics | \
	    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p') && cp "$$program" target/lab/unit-tests

bench: ## Measures Outrigger beside its peers, and writes target/bench/report.html; PEER_CLOUD_HYPERVISOR=, PEER_QEMU=, LINUX_KERNEL=, LINUX_INITRAMFS=, VFIO_DEVICE=, QUICK=1, ONLY=
	$(CARGO) build --release --locked --package vmm --bin outrigger --package tests --bin bench
	$(RELEASE)/bench run --outrigger $(RELEASE)/outrigger $(if $(QUICK),--quick) $(addprefix --only ,$(ONLY)) \
	    $(if $(PEER_CLOUD_HYPERVISOR),--cloud-hypervisor $(PEER_CLOUD_HYPERVISOR)) $(if $(PEER_QEMU),--qemu $(PEER_QEMU)) \
	    $(if $(LINUX_KERNEL),--linux-kernel $(LINUX_KERNEL)) $(if $(LINUX_INITRAMFS),--linux-initramfs $(LINUX_INITRAMFS)) \
	    $(if $(VFIO_DEVICE),--vfio-device $(VFIO_DEVICE))

bench-lab: programs ## Runs the parts of `make bench` that need Linux guests in the lab, where they can run and times mean nothing
	$(CARGO) build --release --locked --package tests --bin bench
	@tests/lab/run.sh $(LAB_DEADLINE) $(RELEASE)/lab-cases --bench

lint: ## Checks the format, the lints and the documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked

clean: ## Removes all that was built and fetched
	$(CARGO) clean
