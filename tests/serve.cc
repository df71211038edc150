// Serves an export as TF Serving does, with tensorflow::LoadSavedModel, and prints what it finds.
//
//     serve EXPORT HEIGHT WIDTH PIXELS ENCODED...
//
// PIXELS is a file of uint8 [B, HEIGHT, WIDTH, 3] for `serving_default`; the other files are one batch of
// `serving_bytes`. A line for each image: signature, count, then score, label and box of each detection. Bytes that
// are no image come in between: a line "bad" with the status' code.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/public/session.h"

using tensorflow::Tensor;

std::string Read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

absl::Status Run(const tensorflow::SavedModelBundle& bundle, const std::string& name, const Tensor& input) {
  const auto& signature = bundle.GetSignatures().at(name);
  std::vector<std::string> fetches;
  for (const char* key : {"num_detections", "scores", "labels", "boxes"}) {
    fetches.push_back(signature.outputs().at(key).name());
  }
  std::vector<Tensor> found;
  absl::Status status = bundle.session->Run({{signature.inputs().begin()->second.name(), input}}, fetches, {}, &found);
  if (!status.ok()) return status;
  for (int i = 0; i < found[0].dim_size(0); ++i) {
    const int count = found[0].flat<int32_t>()(i);
    std::printf("%s %d", name.c_str(), count);
    for (int n = 0; n < count; ++n) {
      auto box = found[3].tensor<float, 3>();
      std::printf(" %.9g %d %.9g %.9g %.9g %.9g", found[1].matrix<float>()(i, n), found[2].matrix<int32_t>()(i, n),
                  box(i, n, 0), box(i, n, 1), box(i, n, 2), box(i, n, 3));
    }
    std::printf("\n");
  }
  return status;
}

int main(int argc, char** argv) {
  tensorflow::SavedModelBundle bundle;
  absl::Status status =
      tensorflow::LoadSavedModel(tensorflow::SessionOptions(), tensorflow::RunOptions(), argv[1], {"serve"}, &bundle);
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
    return 1;
  }
  const int64_t height = std::stol(argv[2]), width = std::stol(argv[3]);
  const std::string pixels = Read(argv[4]);
  const int64_t batch = pixels.size() / (height * width * 3);
  Tensor images(tensorflow::DT_UINT8, tensorflow::TensorShape({batch, height, width, 3}));
  std::memcpy(images.flat<uint8_t>().data(), pixels.data(), pixels.size());

  Tensor bad(tensorflow::DT_STRING, tensorflow::TensorShape({1}));
  bad.flat<tensorflow::tstring>()(0) = "no image";
  std::printf("bad %d\n", static_cast<int>(Run(bundle, "serving_bytes", bad).code()));

  Tensor encoded(tensorflow::DT_STRING, tensorflow::TensorShape({argc - 5}));
  for (int i = 5; i < argc; ++i) encoded.flat<tensorflow::tstring>()(i - 5) = Read(argv[i]);
  for (const auto& [name, input] : {std::pair{"serving_default", images}, std::pair{"serving_bytes", encoded}}) {
    status = Run(bundle, name, input);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
      return 1;
    }
  }
  return 0;
}
