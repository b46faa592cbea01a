# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The compiled functions themselves: NumPy and Numba alone."""
