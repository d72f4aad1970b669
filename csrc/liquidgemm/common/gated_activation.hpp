// Which activation joins two projections in an MLP. Public headers name it, and need no CUTLASS.
#pragma once

namespace liquidgemm {

// What an MLP makes of two projections of its input, in the roundings of eager torch.
enum class GatedActivation : int { kSiluMul, kGeluTanhMul, kSwigluClamped };

}  // namespace liquidgemm
