// The Python module ups_fast._C. Importing it registers the kernels with PyTorch's dispatcher (each file under cpu/ and
// cuda/ does so at its foot); what is offered here is what is not an op.
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cuda/plan.h"

namespace {

// Which schemas the kernels were compiled for: INTERFACE of ups_fast/ops.py, which says when to raise both.
constexpr int kInterface = 4;

const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"torch", UPS_TORCH},
      {"with_cuda", UPS_WITH_CUDA ? "1" : "0"},
      {"cuda", UPS_CUDA},  // toolkit version and architectures, or why there are no CUDA kernels
  };
}

// How the CUDA kernel of an op divides a shape.
std::map<std::string, int64_t> launch_plan(const std::string& op, int64_t rows, int64_t classes) {
  if (rows < 1 || classes < 1) throw std::invalid_argument("rows and classes must be at least 1");
  const bool is_loss = op == "nce_loss" || op == "ups_loss" || op == "ups_loss_multilabel" || op == "fixmatch_loss";
  if (!is_loss && op != "mc_select") {
    throw std::invalid_argument(
        "op must be mc_select, nce_loss, ups_loss, ups_loss_multilabel or fixmatch_loss, got '" + op + "'");
  }
  const ups::cuda::LaunchPlan plan =
      is_loss ? ups::cuda::loss_plan(rows, classes) : ups::cuda::mc_select_plan(rows, classes);
  return {{"variant", plan.variant},
          {"threads_per_row", plan.threads_per_row},
          {"threads", plan.threads},
          {"blocks", plan.blocks}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ups_fast: importing this module registers them as torch.ops.ups_fast.*";
  m.attr("interface") = kInterface;
  m.def("build_info", &build_info, "Compiler, torch and CUDA that this library was built with.");
  m.def("launch_plan", &launch_plan, pybind11::arg("op"), pybind11::arg("rows"), pybind11::arg("classes"),
        "Threads per row and block, blocks and kernel variant that a CUDA op would use for [rows, classes].");
  m.def("isa", [] { return kIsaNames[static_cast<int>(ups::isa())]; }, "Instruction set of the CPU kernels in use.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(ups::best_isa()); ++i) names.emplace_back(kIsaNames[i]);
        return names;
      },
      "Instruction sets that this machine can run, worst first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (int i = 0; i <= static_cast<int>(ups::best_isa()); ++i) {
          if (name == kIsaNames[i]) return ups::set_isa(static_cast<ups::Isa>(i));
        }
        throw std::invalid_argument("isa must be one of available_isas(), got '" + name + "'");
      },
      pybind11::arg("name"), "Run the CPU kernels on another instruction set; for tests and comparisons.");
}
