# What the pipelines in the folders beside this file share: which clipseed they run, and what they say was left out.

EXAMPLES := $(dir $(lastword $(MAKEFILE_LIST)))

# The one on the PATH, or the one that `make install` made. Without either, the first step that needs it says so.
ifndef CLIPSEED
CLIPSEED := $(if $(shell command -v clipseed 2>/dev/null),clipseed,$(abspath $(wildcard $(EXAMPLES)../.venv/bin/clipseed)))
ifeq ($(CLIPSEED),)
CLIPSEED = $(error clipseed is neither on the PATH nor in .venv: run `make install` in its folder, or give CLIPSEED=FILE)
endif
endif

# One damaged image must not stop the others. SKIP='--allow-skipped 5' stops at more than five, SKIP= at the first.
SKIP ?= --allow-skipped

# $(call left-out,FILES): the images and reasons in lists of skipped images, after a title; nothing where there are none.
left-out = for list in $(wildcard $(1)); do echo "left out ($$list):"; tail -n +2 $$list; done
