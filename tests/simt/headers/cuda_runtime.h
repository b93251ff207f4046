// What the kernels need of the CUDA runtime is in simt.h; this stands in for the toolkit's header.
#pragma once

#include "vector_types.h"
