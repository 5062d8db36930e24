// Classify an image with an exported model, on onnxruntime's C API.
//
//   predict model.onnx image.ppm          class names and probabilities (binary .pgm or .ppm)
//   predict model.onnx --raw input.f32    logits of one normalised input, raw float32 [C, H, W]
//   predict model.onnx --bench 100        milliseconds for one sample, median of 100 timings
//
// The model file says how its input is made and what its classes are called (metadata "preprocessing", "classes").

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace {

const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// The numbers of `"key":[1,2,3]` in a flat JSON text.
std::vector<float> numbers(const std::string& json, const std::string& key) {
  std::vector<float> found;
  size_t at = json.find("\"" + key + "\"");
  if (at == std::string::npos) return found;
  at = json.find('[', at);
  size_t end = json.find(']', at);
  while (at < end) {
    char* stop = nullptr;
    float value = std::strtof(json.c_str() + at + 1, &stop);
    if (stop == json.c_str() + at + 1) break;
    found.push_back(value);
    at = static_cast<size_t>(stop - json.c_str());
  }
  return found;
}

// The texts of `["a","b"]`; escapes are kept as they stand.
std::vector<std::string> texts(const std::string& json) {
  std::vector<std::string> found;
  for (size_t at = json.find('"'); at != std::string::npos; at = json.find('"', at + 1)) {
    size_t end = at + 1;
    while (end < json.size() && (json[end] != '"' || json[end - 1] == '\\')) ++end;
    found.push_back(json.substr(at + 1, end - at - 1));
    at = end;
  }
  return found;
}

struct Image {
  int width = 0, height = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

int header_number(std::istream& file) {
  for (file >> std::ws; file.peek() == '#'; file >> std::ws) file.ignore(1 << 20, '\n');
  int value = 0;
  file >> value;
  return value;
}

Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  file >> kind;
  if (kind != "P5" && kind != "P6") throw std::runtime_error(path + ": not a binary .pgm or .ppm file");
  Image image;
  image.channels = kind == "P5" ? 1 : 3;
  image.width = header_number(file);
  image.height = header_number(file);
  if (header_number(file) != 255 || image.width < 1 || image.height < 1 || image.width > 1 << 15 ||
      image.height > 1 << 15)
    throw std::runtime_error(path + ": only 8-bit images of ordinary size are read");
  file.get();
  image.pixels.resize(static_cast<size_t>(image.width) * image.height * image.channels);
  file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
  if (!file) throw std::runtime_error(path + ": cut off");
  return image;
}

// How much each old pixel gives to each new one: bilinear, widened when shrinking (as runner.py does).
std::vector<std::vector<double>> weights(int before, int after) {
  std::vector<std::vector<double>> rows(after, std::vector<double>(before, 0.0));
  double reach = std::max(1.0, static_cast<double>(before) / after);
  for (int i = 0; i < after; ++i) {
    if (before == after) {
      rows[i][i] = 1.0;
      continue;
    }
    double centre = (i + 0.5) * before / after, sum = 0.0;
    for (int j = 0; j < before; ++j) sum += rows[i][j] = std::max(0.0, 1.0 - std::abs(j + 0.5 - centre) / reach);
    for (double& value : rows[i]) value /= sum;
  }
  return rows;
}

double channel(const Image& image, int y, int x, int c, int wanted) {
  const uint8_t* pixel = &image.pixels[(static_cast<size_t>(y) * image.width + x) * image.channels];
  if (image.channels == wanted) return pixel[c] / 255.0;
  if (wanted == 1) return (0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]) / 255.0;
  return pixel[0] / 255.0;
}

class Model {
 public:
  explicit Model(const std::string& path) {
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "predict", &environment_));
    OrtSessionOptions* options = nullptr;
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, 1));
    check(api->CreateSession(environment_, path.c_str(), options, &session_));
    api->ReleaseSessionOptions(options);
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    read_shape();
    std::string made = metadata("preprocessing");
    mean_ = numbers(made, "mean");
    std_ = numbers(made, "std");
    mean_.resize(shape_[1], 0.0f);
    std_.resize(shape_[1], 1.0f);
    classes_ = texts(metadata("classes"));
  }

  ~Model() {
    api->ReleaseMemoryInfo(memory_);
    api->ReleaseSession(session_);
    api->ReleaseEnv(environment_);
  }

  size_t input_size() const { return static_cast<size_t>(shape_[1] * shape_[2] * shape_[3]); }

  std::vector<float> logits(std::vector<float>& input) const {
    const char* names[] = {"input"};
    const char* results[] = {"output"};
    OrtValue *fed = nullptr, *found = nullptr;
    check(api->CreateTensorWithDataAsOrtValue(memory_, input.data(), input.size() * sizeof(float), shape_.data(),
                                              shape_.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &fed));
    check(api->Run(session_, nullptr, names, const_cast<const OrtValue* const*>(&fed), 1, results, 1, &found));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t count = 0;
    float* data = nullptr;
    check(api->GetTensorTypeAndShape(found, &info));
    check(api->GetTensorShapeElementCount(info, &count));
    check(api->GetTensorMutableData(found, reinterpret_cast<void**>(&data)));
    std::vector<float> values(data, data + count);
    api->ReleaseTensorTypeAndShapeInfo(info);
    api->ReleaseValue(found);
    api->ReleaseValue(fed);
    return values;
  }

  std::vector<float> preprocess(const Image& image) const {
    int channels = static_cast<int>(shape_[1]), height = static_cast<int>(shape_[2]), width = static_cast<int>(shape_[3]);
    auto rows = weights(image.height, height), columns = weights(image.width, width);
    std::vector<float> input;
    input.reserve(input_size());
    for (int c = 0; c < channels; ++c)
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          double sum = 0.0;
          for (int y = 0; y < image.height; ++y)
            if (rows[i][y] != 0.0)
              for (int x = 0; x < image.width; ++x)
                if (columns[j][x] != 0.0) sum += rows[i][y] * columns[j][x] * channel(image, y, x, c, channels);
          input.push_back(static_cast<float>((sum - mean_[c]) / std_[c]));
        }
    return input;
  }

  // Only files of other tasks name theirs.
  bool classifies() const {
    std::string task = metadata("task");
    return task.empty() || task.find("\"name\":\"classification\"") != std::string::npos;
  }
  std::string name(size_t index) const { return index < classes_.size() ? classes_[index] : std::to_string(index); }

 private:
  void read_shape() {
    OrtTypeInfo* type = nullptr;
    const OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t rank = 0;
    check(api->SessionGetInputTypeInfo(session_, 0, &type));
    check(api->CastTypeInfoToTensorInfo(type, &info));
    check(api->GetDimensionsCount(info, &rank));
    shape_.resize(rank);
    check(api->GetDimensions(info, shape_.data(), rank));
    api->ReleaseTypeInfo(type);
    if (rank != 4) throw std::runtime_error("the model's input is not [batch, channels, height, width]");
    shape_[0] = 1;
    for (int64_t size : shape_)
      if (size < 1 || size > 1 << 15) throw std::runtime_error("the model's input size is open or absurd");
  }

  std::string metadata(const char* key) const {
    OrtModelMetadata* data = nullptr;
    OrtAllocator* allocator = nullptr;
    char* value = nullptr;
    check(api->SessionGetModelMetadata(session_, &data));
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    check(api->ModelMetadataLookupCustomMetadataMap(data, allocator, key, &value));
    std::string text = value == nullptr ? "" : value;
    if (value != nullptr) check(api->AllocatorFree(allocator, value));
    api->ReleaseModelMetadata(data);
    return text;
  }

  OrtEnv* environment_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<int64_t> shape_;
  std::vector<float> mean_, std_;
  std::vector<std::string> classes_;
};

void print_raw(const Model& model, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<float> input(model.input_size());
  file.read(reinterpret_cast<char*>(input.data()), static_cast<std::streamsize>(input.size() * sizeof(float)));
  if (!file) throw std::runtime_error(path + ": fewer numbers than the model's input takes");
  for (float value : model.logits(input)) std::printf("%.9g\n", value);
}

void print_bench(const Model& model, int runs) {
  std::vector<float> input(model.input_size(), 0.5f);
  std::vector<double> timings;
  for (int i = 0; i < 5; ++i) model.logits(input);
  for (int i = 0; i < runs; ++i) {
    auto start = std::chrono::steady_clock::now();
    model.logits(input);
    timings.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(timings.begin(), timings.begin() + runs / 2, timings.end());
  std::printf("median %.4f ms\n", timings[runs / 2]);
}

void print_image(const Model& model, const std::string& path) {
  std::vector<float> input = model.preprocess(read_image(path));
  std::vector<float> values = model.logits(input);
  if (!model.classifies())
    throw std::runtime_error("this file is of another task than classification: --raw prints its outputs");
  float top = *std::max_element(values.begin(), values.end());
  double sum = 0.0;
  for (float value : values) sum += std::exp(value - top);
  std::vector<size_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  for (size_t i = 0; i < std::min<size_t>(3, order.size()); ++i)
    std::printf("%s %.4f\n", model.name(order[i]).c_str(), std::exp(values[order[i]] - top) / sum);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> given(arguments + 1, arguments + count);
  if (given.size() < 2) {
    std::fprintf(stderr, "usage: predict model.onnx image.ppm | --raw input.f32 | --bench runs\n");
    return 2;
  }
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    std::fprintf(stderr, "the onnxruntime library is older than the header this was built with\n");
    return 3;
  }
  try {
    Model model(given[0]);
    if (given[1] == "--raw" && given.size() > 2)
      print_raw(model, given[2]);
    else if (given[1] == "--bench" && given.size() > 2)
      print_bench(model, std::max(1, std::atoi(given[2].c_str())));
    else
      print_image(model, given[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
