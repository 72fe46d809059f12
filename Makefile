# heliofs: `make demo` shows it working, `make test` tests it. `make help` lists the rest.
# One build profile (release) for everything, so that RocksDB compiles once.

SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(CURDIR)/target
NEXTEST := $(shell command -v cargo-nextest)

.DEFAULT_GOAL := help
.PHONY: help build demo test suites faults churn chaos soak caps fuzz bench-quick bench-pack bench-scale bench-failover bench-mirror bench-copy fill token-trials promotion-pause lint install

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: ## A cluster, a mount, a leader killed in the middle of a copy, every byte compared; a mirror region takes over
	@.ci/demo

test: ## The whole test suite
	@.ci/setup test
ifneq ($(NEXTEST),)
	cargo nextest run --release --workspace --config-file .ci/nextest.toml
else
	cargo test --release --workspace --no-fail-fast -- --test-threads=2
endif

build: ## The heliofs command, at $(CARGO_TARGET_DIR)/release/heliofs
	@.ci/setup build
	cargo build --release --workspace --bins

install: build ## Copies the command to $(PREFIX)/bin (default /usr/local), with the fstab helper
	install -D -m 755 $(CARGO_TARGET_DIR)/release/heliofs $(DESTDIR)$(or $(PREFIX),/usr/local)/bin/heliofs
	ln -sf $(or $(PREFIX),/usr/local)/bin/heliofs $(DESTDIR)/sbin/mount.heliofs

suites: ## pjdfstest, fsx, stress-ng and dbench on a real mount; REDUCED=1: in three minutes; WRITEBACK=1, ENCODED=1, DIR_AHEAD=1: with --writeback, with codecs, with --dir-ahead
	@.ci/suites $(if $(REDUCED),--reduced) $(if $(WRITEBACK),--writeback) $(if $(ENCODED),--encoded) $(if $(DIR_AHEAD),--dir-ahead) $(SUITES)

faults: ## Each fault of an S3 server for a minute, under fsx and a checked load
	@.ci/faults

churn: ## Stored bytes beside live bytes under random changes; OPERATIONS and LIVE_MIB set the size
	@.ci/churn

chaos: ## Ten minutes of faults on both sides of a mirror; what readers saw is recorded in ./history.jsonl and checked
	HELIOFS_CHAOS_SECONDS=600 HELIOFS_CHAOS_HISTORY=$(CURDIR)/history.jsonl \
		cargo test --release --workspace --test mirror_chaos -- --nocapture

soak: ## Ten minutes of two mounts that answer ahead, under killed and silent leaders
	HELIOFS_SOAK_SECONDS=600 cargo test --release --workspace --test directory_soak -- --nocapture

caps: ## 2 GiB of log written at a source whose mirror, with a cap of 256 MiB, is away; it comes back and keeps its objects
	HELIOFS_CAP_MIB=256 cargo test --release --workspace --test mirror_copy past_its_cap -- --nocapture

fuzz: ## A million rounds of decoding damaged segments and records
	FUZZ_ITERATIONS=1000000 cargo test --release --workspace --lib --test fuzz_records of_any_bytes

bench-quick: ## heliofs beside JuiceFS, minutes; DIR_AHEAD=1: with --dir-ahead
	@benches/quick

bench-pack: ## Requests to the bucket for 20,000 small files, heliofs beside JuiceFS
	@benches/pack

bench-scale: ## Memory and disk of 5 million inodes; others' latencies beside huge removals
	@benches/scale

bench-failover: ## How long creates stand still when the leader is killed, or frozen
	@benches/failover

token-trials: ## A thousand times: what was written before a token is in the mirror's own bucket after it was waited for
	HELIOFS_TOKEN_TRIALS=1000 cargo nextest run --release --workspace --config-file .ci/nextest.toml -P trials --test mirror_copy a_token

promotion-pause: ## How long nobody writes while three nodes hand over to three that are 100 ms away; at most 5 s
	HELIOFS_PAUSE_MAX_MS=5000 cargo test --release --workspace --test mirror_promote three_nodes -- --nocapture

bench-copy: ## How fast objects are copied into a mirror's own bucket by one worker and by two, over a link
	@benches/copy

fill: ## A volume of 10 GiB is copied into a mirror's own bucket by two workers, and every byte compared
	@HELIOFS_BENCH_MIB=10240 HELIOFS_BENCH_RTT=50 HELIOFS_BENCH_THREADS=8 HELIOFS_BENCH_WORKERS=2 benches/copy

bench-mirror: ## How far a mirror is behind over links of 50, 150 and 300 ms, and how quickly it catches up
	@benches/mirror

lint: ## What CI checks before it tests
	@.ci/setup build
	cargo fmt --check
	cargo clippy --release --workspace --all-targets -- -D warnings
