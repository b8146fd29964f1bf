"""A process starts anew with settings for glibc, unless the user made some; other programs get none."""

from __future__ import annotations

import os
import sys

import pytest

from vl_jax.runtime import allocator

VARIABLE = "GLIBC_TUNABLES"


@pytest.fixture
def started(monkeypatch) -> list[dict[str, str]]:
    """The environments that processes were started with."""
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: environments.append(environment))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(VARIABLE, raising=False)
    return environments


def test_it_asks_for_huge_pages(started):
    allocator.start_anew()
    assert started[0][VARIABLE] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("settings", ["glibc.malloc.tcache_count=7", ""])
def test_it_yields_to_the_user(started, monkeypatch, settings):
    monkeypatch.setenv(VARIABLE, settings)
    allocator.start_anew()
    with allocator.as_found():
        assert os.environ[VARIABLE] == settings
    assert not started


def test_other_programs_are_given_nothing_of_ours(started, monkeypatch):
    allocator.start_anew()
    monkeypatch.setenv(VARIABLE, ours := started[0][VARIABLE])
    with allocator.as_found():
        assert VARIABLE not in os.environ
    assert os.environ[VARIABLE] == ours
