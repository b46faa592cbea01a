# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Changes to other packages, one a file: what they do otherwise, and until which release that was checked.

What a machine lacks is supplied by :mod:`nemo_ee.runtime.stand_ins`. Nothing outside `nemo_ee.runtime` changes others.
"""
