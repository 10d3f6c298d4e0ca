# `make` prints the targets; `make demo` and `make test` do all set-up that they need.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# As for cargo: where everything goes that is built, fetched or found.
target      := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Where the extension is built, which is of one major version; the agent and the tests serve all of them.
built       := $(target)$(if $(filter-out 16,$(POSTGRESQL)),/$(POSTGRESQL))
# What `make setup` found or fetched; PG_CONFIG=... on the command line wins.
pg_config    = $$(cat '$(built)/pg_config')
# The cargo features of the extension: one major version of PostgreSQL.
pg_features  = --no-default-features --features pg$$($(pg_config) --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
# pgrx reads the one, the test harness the other. An error of a test says by itself what failed; forty frames hide it.
environment  = export RUST_LIB_BACKTRACE=0 PGRX_PG_CONFIG_PATH=$(pg_config) PG_CONFIG=$(pg_config) STILLEBOT_AGENT='$(target)/release/stillebot-agent';
CARGO       ?= cargo
# Tests spend their time waiting for servers: more of them at once than there are processors.
TEST_THREADS ?= 6

VERSION      = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: help setup build install install-agent manual deb debian demo test test-pairs test-versions test-debian test-hosts fuzz bench lint clean

help:
	@echo 'make demo                 two live servers, hopped between under load; KEEP=1 leaves them running'
	@echo 'make test                 proves every promise, on real servers'
	@echo 'make test-pairs           a 16 and an 18 that replicate, and the upgrade from the one to the other'
	@echo 'make test-versions        these, and the suite on each PostgreSQL of VERSIONS="16 18"'
	@echo 'make test-debian          the suite on PostgreSQL 17 as Debian 13 has it, with the packages, in a throw-away copy of its image; root only'
	@echo 'make test-hosts           the packages, and a pair that much befalls, on whole Debian 13 hosts that it makes; root only'
	@echo 'make fuzz                 the decoder of replication messages, against noise; SECONDS=60'
	@echo 'make bench                figures, as ratios to plain PostgreSQL; SUBJECTS="pgbench hops apply conflicts"'
	@echo 'make setup                packages and a PostgreSQL >= 16 (the other targets call it); PG_CONFIG=... or POSTGRESQL=18 chooses'
	@echo 'make build                the extension and the agent, under target/release'
	@echo 'make install PG_CONFIG=/usr/lib/postgresql/16/bin/pg_config   the extension into that PostgreSQL; honours DESTDIR'
	@echo 'make install-agent        the agent, its systemd unit, man pages and completions into $$(PREFIX), /usr/local by default; honours DESTDIR'
	@echo 'make deb PG_CONFIG=...    both as Debian packages, under target/deb'
	@echo 'make lint                 formatting and clippy, without a warning'
	@echo 'make clean                removes target/, fetched servers included'

setup:
	@CARGO_TARGET_DIR='$(built)' PG_CONFIG='$(PG_CONFIG)' POSTGRESQL='$(POSTGRESQL)' scripts/setup

build: setup
	@$(environment) $(CARGO) build --release --locked --target-dir '$(built)' --package stillebot $(pg_features)
	@$(environment) $(CARGO) build --release --locked --package stillebot-agent

install: setup
	@$(environment) $(CARGO) build --release --locked --target-dir '$(built)' --package stillebot $(pg_features)
	@pg_config=$(pg_config); library=$(DESTDIR)$$($$pg_config --pkglibdir); share=$(DESTDIR)$$($$pg_config --sharedir)/extension; \
	mkdir -p "$$library" "$$share" 2>/dev/null && test -w "$$library" && test -w "$$share" || \
	  { echo "make install: cannot write to $$library and $$share; run it as their owner (root, usually)" >&2; exit 1; }; \
	rm -f "$$library/stillebot.so"; \
	install -m 755 '$(built)/release/libstillebot.so' "$$library/stillebot.so"; \
	install -m 644 extension/stillebot.control sql/stillebot--*.sql "$$share/"; \
	echo "installed stillebot into $$library and $$share"

PREFIX ?= /usr/local
# Where zsh looks: Debian keeps its packages apart from what is installed by hand.
ZSH_COMPLETIONS = $(if $(filter /usr,$(PREFIX)),vendor-completions,site-functions)
install-agent: manual
	@$(environment) $(CARGO) build --release --locked --package stillebot-agent
	install -D -m 755 '$(target)/release/stillebot-agent' '$(DESTDIR)$(PREFIX)/bin/stillebot-agent'
	install -d '$(DESTDIR)$(PREFIX)/lib/systemd/system'
	sed 's#/usr/local/#$(PREFIX)/#' agent/systemd/stillebot-agent.service \
	  > '$(DESTDIR)$(PREFIX)/lib/systemd/system/stillebot-agent.service'
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/man/man1' '$(target)'/manual/man1/*
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/bash-completion/completions' '$(target)/manual/bash/stillebot-agent'
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/zsh/$(ZSH_COMPLETIONS)' '$(target)/manual/zsh/_stillebot-agent'
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d' '$(target)/manual/fish/stillebot-agent.fish'
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/doc/stillebot-agent/examples' agent/agent.toml
	install -D -m 755 agent/certbot/stillebot '$(DESTDIR)$(PREFIX)/share/stillebot/certbot-deploy-hook'

# What the command line itself says, as man pages and completions.
manual: setup
	@rm -rf '$(target)/manual'
	@$(environment) $(CARGO) run --quiet --release --locked --package stillebot-agent --example manual -- '$(target)/manual'

deb:
	@VERSION='$(VERSION)' PG_CONFIG='$(PG_CONFIG)' scripts/deb

demo: build install
	@$(environment) $(CARGO) run --quiet --release --locked --package stillebot-tests --bin demo

test: build install
	@$(environment) $(CARGO) test --release --locked --target-dir '$(built)' --package stillebot $(pg_features)
	@$(environment) $(CARGO) test --release --locked --package stillebot-agent --package stillebot-tests -- --test-threads=$(TEST_THREADS)

VERSIONS ?= 16 18
test-versions: test-pairs
	@for version in $(VERSIONS); do $(MAKE) --no-print-directory test POSTGRESQL=$$version; done

# Two servers of different versions, which `make test` cannot have.
test-pairs: build
	@for version in 16 18; do $(MAKE) --no-print-directory install POSTGRESQL=$$version; done
	@$(environment) export PG_CONFIG_16=$$(cat '$(target)/pg_config') PG_CONFIG_18=$$(cat '$(target)/18/pg_config'); \
	$(CARGO) test --release --locked --package stillebot-tests --test promises -- --ignored 16_and_18 upgraded

# What a Debian 13 host needs: the image, and this project's packages for its PostgreSQL.
debian: setup
	@scripts/debian-image
	@$(MAKE) --no-print-directory deb PG_CONFIG='$(CURDIR)/target/debian-13/pg_config'

# The suite on Debian's own PostgreSQL 17, with the packages, and the pair of it and a 16.
test-debian: debian install
	@$(environment) export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/scripts/in-debian' PG_CONFIG_16=$(pg_config); \
	$(CARGO) test --release --locked --package stillebot-tests --test promises -- --test-threads=$(TEST_THREADS); \
	$(CARGO) test --release --locked --package stillebot-tests --test promises -- --ignored 16_and_17

test-hosts: debian
	@$(environment) $(CARGO) test --release --locked --package stillebot-tests --test hosts

# Arithmetic that overflows is silent in the profile that everything else is built with.
fuzz: setup
	@$(environment) $(CARGO) run --quiet --release --locked --package stillebot-tests --bin fuzz \
	  --config profile.release.package.stillebot-tests.overflow-checks=true

bench: build install
	@$(environment) $(CARGO) run --quiet --release --locked --package stillebot-tests --bin bench -- $(SUBJECTS)

lint: setup
	@$(CARGO) fmt --all --check
	@$(environment) $(CARGO) clippy --release --locked --all-targets --target-dir '$(built)' --package stillebot $(pg_features) -- -D warnings
	@$(environment) $(CARGO) clippy --release --locked --all-targets --package stillebot-agent --package stillebot-tests -- -D warnings

clean:
	$(CARGO) clean
