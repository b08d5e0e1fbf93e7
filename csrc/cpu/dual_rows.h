// The CPU solver of `dual` (dual.cpp), for operators that solve rows of their own.
#pragma once

#include "armor/row.h"

namespace armor::cpu {

// Solves all rows, in parallel; T is float or double.
template <class T>
void solve_rows(const Rows<T>& all);

}  // namespace armor::cpu
