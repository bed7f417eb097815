"""The long evidence that memchunk never lies: faults, races, damage, pressure, fuzz.

    pytest torture                 the short form, of some minutes
    TORTURE=long pytest torture    the long one

Each module says what it does to the library and what must hold. At the end pytest
prints how many cases there were. Everything runs against real memcached processes,
except `test_interleavings` and parts of `test_damage`, which run against `model.Store`.
"""
