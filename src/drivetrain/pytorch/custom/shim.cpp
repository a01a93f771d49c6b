// The optional C++ part of custom devices: memory, the current device, streams, events, generators
// and views of PrivateUse1. It holds no kernels; those are the same Python functions with it and
// without. Built on demand (shim_build.py), for one torch and one Python.
//
// Memory comes from the CPU's allocator, or from Python callables that a device was started with.
// They are called with the GIL, which no caller waits for while it holds a lock of ours.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr auto kHere = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;
constexpr int kMost = 64;

// -- Python ---------------------------------------------------------------------------------------

bool python_is_alive() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

// The Python error that is set, as an exception that may cross threads.
[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

struct Called {
  PyObject* result;
  explicit Called(PyObject* given) : result(given) {
    if (!result) throw_python_error();
  }
  ~Called() { Py_DECREF(result); }
};

// -- devices and their memory ---------------------------------------------------------------------

struct Place {
  // Null where the memory is the CPU allocator's.
  PyObject* allocate = nullptr;  // (nbytes) -> address
  PyObject* release = nullptr;   // (address, nbytes)
  PyObject* copy = nullptr;      // (dst, src, nbytes); null where the host may touch the memory
  std::atomic<int64_t> used{0};
  std::atomic<int64_t> peak{0};
};

std::array<Place, kMost> places;
int count = 0;
PyObject* py_synchronize = nullptr;  // (index)
PyObject* py_memory_info = nullptr;  // (index) -> (free, total)
thread_local int current = 0;
thread_local std::array<int64_t, kMost> streams{};
std::atomic<int64_t> last_stream{0};

int index_of(c10::Device device) {
  const int index = device.has_index() ? device.index() : current;
  TORCH_CHECK(
      index < count, "there is no ", c10::Device(kHere, index).str(), "; the last device is ",
      c10::Device(kHere, static_cast<c10::DeviceIndex>(count - 1)).str());
  return index;
}

c10::Device device_at(int index) {
  return {kHere, static_cast<c10::DeviceIndex>(index)};
}

struct Within {
  int before;
  explicit Within(int index) : before(current) { current = index; }
  ~Within() { current = before; }
};

void counted(int index, int64_t nbytes) {
  auto& place = places[index];
  const int64_t now = place.used += nbytes;
  int64_t peak = place.peak;
  while (now > peak && !place.peak.compare_exchange_weak(peak, now)) {
  }
}

struct Block {
  void* address;
  size_t nbytes;
  int index;
};

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  auto& place = places[block->index];
  place.used -= static_cast<int64_t>(block->nbytes);
  if (!place.release) {
    c10::free_cpu(block->address);
  } else if (python_is_alive()) {  // else the process ends, and its memory with it
    Gil gil;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);  // tensors die while exceptions are on their way
    PyObject* done = PyObject_CallFunction(
        place.release, "KK", reinterpret_cast<unsigned long long>(block->address),
        static_cast<unsigned long long>(block->nbytes));
    if (done) {
      Py_DECREF(done);
    } else {
      PyErr_WriteUnraisable(place.release);
    }
    PyErr_Restore(type, value, traceback);
  }
  delete block;
}

c10::DataPtr take(size_t nbytes, int index) {
  if (!nbytes) return {nullptr, device_at(index)};
  auto& place = places[index];
  void* address;
  if (!place.allocate) {
    address = c10::alloc_cpu(nbytes);
  } else {
    Gil gil;
    Called given(PyObject_CallFunction(place.allocate, "K", (unsigned long long)nbytes));
    address = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(given.result));
    if (PyErr_Occurred()) throw_python_error();
  }
  counted(index, static_cast<int64_t>(nbytes));
  return {address, new Block{address, nbytes, index}, &give_back, device_at(index)};
}

void copy_bytes(void* dst, const void* src, size_t nbytes, int index) {
  if (!nbytes) return;
  auto& place = places[index];
  if (!place.copy) {
    std::memcpy(dst, src, nbytes);
    return;
  }
  Gil gil;
  Called done(PyObject_CallFunction(
      place.copy, "KKK", reinterpret_cast<unsigned long long>(dst),
      reinterpret_cast<unsigned long long>(src), static_cast<unsigned long long>(nbytes)));
}

void synchronize(int index) {
  Gil gil;
  Called done(PyObject_CallFunction(py_synchronize, "i", index < 0 ? current : index));
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    return take(nbytes, current);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* dst, const void* src, size_t nbytes) const override {
    copy_bytes(dst, src, nbytes, current);
  }
  bool initialized() override {
    return count > 0;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex given) override {
    auto& place = places[index_of({kHere, given})];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*each)[0].current = place.used;
      (*each)[0].peak = place.peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex given) override {
    auto& place = places[index_of({kHere, given})];
    place.peak = place.used.load();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex given) override {
    Gil gil;
    Called told(PyObject_CallFunction(py_memory_info, "i", index_of({kHere, given})));
    unsigned long long free, total;
    if (!PyArg_ParseTuple(told.result, "KK", &free, &total)) throw_python_error();
    return {free, total};
  }
};

Allocator& allocator() {
  static auto* made = new Allocator;  // tensors outlive what ends with the process
  return *made;
}

// -- memory of the host that others recognise as pinned ------------------------------------------

struct Pinned final : c10::Allocator {
  std::mutex lock;
  std::map<const char*, size_t> ranges;

  c10::DataPtr allocate(size_t nbytes) override {
    void* address = c10::alloc_cpu(nbytes ? nbytes : 1);
    std::lock_guard<std::mutex> guard(lock);
    ranges[static_cast<const char*>(address)] = nbytes ? nbytes : 1;
    return {address, address, &gone, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &gone;
  }
  void copy_data(void* dst, const void* src, size_t nbytes) const override {
    std::memcpy(dst, src, nbytes);
  }
  bool has(const void* given) {
    const auto* address = static_cast<const char*>(given);
    std::lock_guard<std::mutex> guard(lock);
    auto next = ranges.upper_bound(address);
    if (next == ranges.begin()) return false;
    --next;
    return address < next->first + next->second;
  }
  static void gone(void* address);
};

Pinned& pinned() {
  static auto* made = new Pinned;
  return *made;
}

void Pinned::gone(void* address) {
  {
    std::lock_guard<std::mutex> guard(pinned().lock);
    pinned().ranges.erase(static_cast<const char*>(address));
  }
  c10::free_cpu(address);
}

// -- devices, streams, events ---------------------------------------------------------------------

// A device has one queue: streams are numbers, and an event is past when the queue was empty.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kHere;
  }
  c10::Device getDevice() const override {
    return device_at(current);
  }
  void setDevice(c10::Device device) const override {
    current = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index() && device.index() < count) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(count);
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    const int index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, device_at(index), streams[index % kMost]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device_at(index_of(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device_at(index_of(device)), ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const auto before = getStream(stream.device());
    streams[before.device_index() % kMost] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    synchronize(stream.device_index());
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(stream.device_index());
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    synchronize(index);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    synchronize(stream.device_index());
    if (!*event) *event = new std::chrono::steady_clock::time_point;
    *static_cast<std::chrono::steady_clock::time_point*>(*event) =
        std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<std::chrono::steady_clock::time_point*>(event);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto from = *static_cast<std::chrono::steady_clock::time_point*>(first);
    const auto to = *static_cast<std::chrono::steady_clock::time_point*>(second);
    return std::chrono::duration<double, std::milli>(to - from).count();
  }
};

// -- random numbers -------------------------------------------------------------------------------

// A generator of the device is one of the CPU under the device's name.
struct Generator final : c10::GeneratorImpl {
  at::Generator own;
  Generator(at::Generator given, int index)
      : c10::GeneratorImpl(device_at(index), c10::DispatchKeySet(kKey)), own(std::move(given)) {}
  void set_current_seed(uint64_t seed) override {
    own.unsafeGetGeneratorImpl()->set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    own.unsafeGetGeneratorImpl()->set_offset(offset);
  }
  uint64_t get_offset() const override {
    return own.unsafeGetGeneratorImpl()->get_offset();
  }
  uint64_t current_seed() const override {
    return own.unsafeGetGeneratorImpl()->current_seed();
  }
  uint64_t seed() override {
    return own.unsafeGetGeneratorImpl()->seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    own.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return own.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    return new Generator(own.clone(), device().index());
  }
};

std::vector<at::Generator>& generators() {
  static auto* made = new std::vector<at::Generator>;
  return *made;
}

// -- what torch asks of a device ------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return count > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(count);
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    current = index_of({kHere, index});
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto before = getCurrentDevice();
    if (index >= 0) setCurrentDevice(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return generators().at(index_of({kHere, index}));
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(
        at::detail::createCPUGenerator(), index_of({kHere, index}));
  }
  at::Device getDeviceFromPtr(void*) const override {
    return device_at(current);
  }
  bool isPinnedPtr(const void* data) const override {
    return pinned().has(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto* whole = storage.unsafeGetStorageImpl();
    const int index = index_of(storage.device());
    auto fresh = take(nbytes, index);
    copy_bytes(fresh.get(), storage.data(), std::min(nbytes, storage.nbytes()), index);
    whole->set_data_ptr_noswap(std::move(fresh));
    whole->set_nbytes(nbytes);
  }
};

Hooks& hooks() {
  static auto* made = new Hooks;
  return *made;
}

// -- one memory, two devices ----------------------------------------------------------------------

void let_go(void* held) {
  delete static_cast<c10::Storage*>(held);
}

void check_plain(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(),
      "a custom device has plain tensors only: none that are quantized or nested");
}

// The tensor of host-visible memory as one of the CPU; conj and neg bits are carried over.
at::Tensor on_host(const at::Tensor& tensor) {
  check_plain(tensor);
  TORCH_CHECK(
      tensor.device().type() == kHere,
      "expected all tensors to be on the same device, but one is on ", tensor.device(),
      "; move it with .to()");
  if (tensor._is_zerotensor()) {  // autograd's zeros have no memory at all
    return at::zeros(tensor.sizes(), at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU));
  }
  const auto& storage = tensor.storage();
  c10::Storage alias(
      c10::Storage::use_byte_size_t{}, storage.nbytes(),
      c10::DataPtr(
          storage.mutable_data(), new c10::Storage(storage), &let_go, c10::Device(c10::kCPU)),
      /*allocator=*/nullptr, /*resizable=*/false);
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
  if (tensor.is_conj()) keys = keys.add(c10::DispatchKey::Conjugate);
  if (tensor.is_neg()) keys = keys.add(c10::DispatchKey::Negative);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

struct Lent {
  c10::Storage storage;
  int64_t nbytes;
  int index;
};

void lent_back(void* held) {
  auto* lent = static_cast<Lent*>(held);
  places[lent->index].used -= lent->nbytes;
  delete lent;
}

// A tensor of the CPU without bits or gradient as one of device `index`.
at::Tensor on_device(const at::Tensor& tensor, int index) {
  check_plain(tensor);
  const auto& storage = tensor.storage();
  const auto nbytes = static_cast<int64_t>(storage.nbytes());
  counted(index, nbytes);
  c10::Storage alias(
      c10::Storage::use_byte_size_t{}, storage.nbytes(),
      c10::DataPtr(
          storage.mutable_data(), new Lent{storage, nbytes, index}, &lent_back, device_at(index)),
      &allocator(), /*resizable=*/true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(alias), c10::DispatchKeySet(kKey), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// -- operations that touch no elements ------------------------------------------------------------

int placed(const std::optional<c10::Device>& device) {
  return device ? index_of(*device) : current;
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  Within here(placed(device));
  return at::detail::empty_generic(
      size, &allocator(), c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  Within here(placed(device));
  return at::detail::empty_strided_generic(
      size, stride, &allocator(), c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype));
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  // torch's own would grow the storage by the host's hand, which may not touch it.
  const auto itemsize = self.dtype().itemsize();
  const auto needed = stride.empty() && !size.empty()
      ? at::detail::computeStorageNbytesContiguous(size, itemsize, offset)
      : at::detail::computeStorageNbytes(size, stride, itemsize, offset);
  if (source.device_type() == kHere && offset >= 0 && needed > source.nbytes()) {
    hooks().resizePrivateUse1Bytes(source, needed);
  }
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  return at::native::set_(self, std::move(source));
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_tensor_(self, source);
}

at::Tensor& set_nothing(at::Tensor& self) {
  const int index = index_of(self.device());
  at::Storage none(
      c10::Storage::use_byte_size_t{}, 0, c10::DataPtr(nullptr, device_at(index)), &allocator(),
      /*resizable=*/true);
  return at::native::set_storage_cpu_(self, std::move(none), 0, {0}, {});
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) {
  return at::native::view(self, size);
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

void register_operations() {
  static auto* library =
      new torch::Library(torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__);
  library->impl("empty.memory_format", TORCH_FN(empty));
  library->impl("empty_strided", TORCH_FN(empty_strided));
  library->impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library->impl("view", TORCH_FN(view));
  library->impl("_reshape_alias", TORCH_FN(reshape_alias));
  library->impl("unfold", TORCH_FN(at::native::unfold));
  library->impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library->impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library->impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library->impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library->impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library->impl("set_", TORCH_FN(set_nothing));
}

// -- the module -----------------------------------------------------------------------------------

PyObject* kept(PyObject* given) {
  if (given == Py_None) return nullptr;
  Py_INCREF(given);
  return given;
}

// start(devices, generators, synchronize, memory_info): once, before torch is told of the device.
PyObject* start(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *devices, *given;
  if (!PyArg_ParseTuple(
          args, "O!O!OO", &PyTuple_Type, &devices, &PyTuple_Type, &given, &py_synchronize,
          &py_memory_info)) {
    return nullptr;
  }
  const auto n = PyTuple_GET_SIZE(devices);
  TORCH_CHECK(!count && n > 0 && n <= kMost && n == PyTuple_GET_SIZE(given), "started wrongly");
  for (Py_ssize_t index = 0; index < n; ++index) {
    PyObject *allocate, *release, *copy;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(devices, index), "OOO", &allocate, &release, &copy)) {
      return nullptr;
    }
    auto& place = places[index];
    place.allocate = kept(allocate);
    place.release = kept(release);
    place.copy = kept(copy);
    generators().push_back(at::make_generator<Generator>(
        THPGenerator_Unwrap(PyTuple_GET_ITEM(given, index)), static_cast<int>(index)));
  }
  kept(py_synchronize);
  kept(py_memory_info);
  count = static_cast<int>(n);
  c10::SetAllocator(kHere, &allocator());
  c10::impl::DeviceGuardImplRegistrar guard(kHere, new Guard);
  at::RegisterPrivateUse1HooksInterface(&hooks());
  register_operations();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

const at::Tensor* tensor_of(PyObject* given) {
  if (THPVariable_Check(given)) return &THPVariable_Unpack(given);
  PyErr_Format(PyExc_TypeError, "a tensor is wanted, not a %s", Py_TYPE(given)->tp_name);
  return nullptr;
}

// host(tensor) -> a tensor of the CPU over the same memory.
PyObject* py_host(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const auto* tensor = tensor_of(given);
  return tensor ? THPVariable_Wrap(on_host(*tensor)) : nullptr;
  END_HANDLE_TH_ERRORS
}

bool parsed(PyObject* given, int* index) {
  *index = static_cast<int>(PyLong_AsLong(given));
  if (PyErr_Occurred()) return false;
  if (*index >= 0 && *index < count) return true;
  PyErr_Format(PyExc_IndexError, "there is no device %d", *index);
  return false;
}

// device(tensor, index) -> a tensor of the device over the same memory.
PyObject* py_device(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 2) {
    PyErr_SetString(PyExc_TypeError, "device(tensor, index)");
    return nullptr;
  }
  int index;
  const auto* tensor = tensor_of(args[0]);
  if (!tensor || !parsed(args[1], &index)) return nullptr;
  return THPVariable_Wrap(on_device(*tensor, index));
  END_HANDLE_TH_ERRORS
}

PyObject* py_current(PyObject*, PyObject*) {
  return PyLong_FromLong(current);
}

PyObject* py_set_current(PyObject*, PyObject* given) {
  int index;
  if (!parsed(given, &index)) return nullptr;
  current = index;
  Py_RETURN_NONE;
}

// memory(index) -> (bytes in use, most bytes ever in use)
PyObject* py_memory(PyObject*, PyObject* given) {
  int index;
  if (!parsed(given, &index)) return nullptr;
  const auto& place = places[index];
  return Py_BuildValue(
      "LL", static_cast<long long>(place.used), static_cast<long long>(place.peak));
}

PyObject* py_reset_peak(PyObject*, PyObject* given) {
  int index;
  if (!parsed(given, &index)) return nullptr;
  places[index].peak = places[index].used.load();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"start", start, METH_VARARGS, nullptr},
    {"host", py_host, METH_O, nullptr},
    {"device", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_device)),
     METH_FASTCALL, nullptr},
    {"current", py_current, METH_NOARGS, nullptr},
    {"set_current", py_set_current, METH_O, nullptr},
    {"memory", py_memory, METH_O, nullptr},
    {"reset_peak", py_reset_peak, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_drivetrain_shim", nullptr, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__drivetrain_shim() {
  return PyModule_Create(&definition);
}
