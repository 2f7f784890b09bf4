// Runs a module's `main` once on a CPU: run LIBRARY OUT [DTYPE DIMS FILE]...
//
// For each input its type, its dimensions with commas between, and a file of its bytes; output i goes to OUT.i as bytes.
// Needs the headers of tvm_ffi alone (those of tvm's wheel are not complete), and tvm_runtime when it runs.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

// What TVM aligns tensors to, and what its functions are compiled for.
constexpr size_t kAlignment = 64;

struct Aligned {
  void AllocData(DLTensor* tensor) {
    size_t room = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, room);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Read(const std::string& dtype, const std::string& dims, const std::string& path) {
  std::vector<int64_t> shape;
  std::istringstream text(dims);
  for (std::string dim; std::getline(text, dim, ',');) shape.push_back(std::stoll(dim));
  DLDevice cpu{kDLCPU, 0};
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), cpu);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor))) {
    throw std::runtime_error(path + " is shorter than the input");
  }
  return tensor;
}

void Write(const ffi::Tensor& tensor, const std::string& path) {
  std::ofstream(path, std::ios::binary).write(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
}

int main(int count, char** given) {
  if (count < 3) return 2;
  try {
    ffi::Module library = ffi::Module::LoadFromFile(given[1]);
    ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    constexpr int kPooled = 2;
    machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooled);
    std::vector<ffi::Tensor> inputs;
    for (int i = 3; i + 2 < count; i += 3) inputs.push_back(Read(given[i], given[i + 1], given[i + 2]));
    std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
    ffi::Any result;
    machine->GetFunction("main").value().CallPacked(arguments.data(), arguments.size(), &result);
    std::string out = std::string(given[2]) + ".";
    if (auto one = result.as<ffi::Tensor>()) {
      Write(*one, out + "0");
    } else {
      int i = 0;
      for (const ffi::Tensor& tensor : result.cast<ffi::Array<ffi::Tensor>>()) Write(tensor, out + std::to_string(i++));
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
