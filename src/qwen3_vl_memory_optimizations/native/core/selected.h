// The kernels in use.
#pragma once

#include "kernels.h"

extern const Kernels *kernels;
