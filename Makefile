# Each target is a thin call to `cargo xtask`. Builds and guest images are shared between checkouts.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stillpoint/target

.PHONY: demo test test-long bench check
demo:
	cargo xtask demo $(if $(SABOTAGE),--sabotage $(SABOTAGE))
test:
	cargo xtask test
test-long:
	cargo xtask test-long
bench:
	cargo xtask bench $(WHAT)
check:
	cargo xtask check
