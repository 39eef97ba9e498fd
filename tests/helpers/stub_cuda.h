// NVIDIA's driver and NVRTC as far as we call them, for tests without a GPU. NVRTC "compiles" a source to itself; the
// driver launches the kernels of decode.cu that were compiled for this CPU, and waits for them.

#include <cstdlib>

// The function that fails, by name, and with which result; whether launches do nothing; the last launch, and how many
// there were.
extern "C" {
char failing[64];
int failure, idle;
uint64_t launches, launch_stream, launch_context;
int nvrtc_architectures[] = {75, 80, 86};
}

namespace {
// Context 0 is none; every thread begins without one.
thread_local std::vector<uint64_t> contexts = {0};
std::vector<std::vector<char>> sources;
char log_text[] = "decode.cu(1): warning: none\ndecode.cu(7): error: unknown word\n2 lines";

struct Program {
    std::vector<char> source, log;
};

int result_of(const char* function) { return strcmp(failing, function) ? 0 : failure; }
}  // namespace

#define CHECKED \
    if (int result = result_of(__func__)) return result

extern "C" {

int cuInit(unsigned) { CHECKED; return 0; }

int cuDeviceGet(int* device, int index) {
    CHECKED;
    *device = index;
    return 0;
}

int cuDevicePrimaryCtxRetain(uint64_t* context, int device) {
    CHECKED;
    *context = 1000 + device;
    return 0;
}

int cuCtxGetCurrent(uint64_t* context) {
    CHECKED;
    *context = contexts.back();
    return 0;
}

int cuCtxPushCurrent_v2(uint64_t context) {
    CHECKED;
    contexts.push_back(context);
    return 0;
}

int cuCtxPopCurrent_v2(uint64_t* context) {
    CHECKED;
    *context = contexts.back();
    contexts.pop_back();
    return contexts.empty() ? 201 : 0;
}

// A module is the context that it was loaded in.
int cuModuleLoadData(uint64_t* module, const char* image) {
    CHECKED;
    if (contexts.back() == 0) return 201;
    *module = strstr(image, "FORMATS(KERNEL)") ? contexts.back() : 0;
    return *module ? 0 : 200;
}

int cuModuleGetFunction(void** function, uint64_t module, const char* name) {
    CHECKED;
    if (contexts.back() != module) return 400;
#define FIND(NAME, ...) \
    if (!strcmp(name, #NAME)) *function = reinterpret_cast<void*>(NAME);
    *function = nullptr;
    FORMATS(FIND)
    return *function ? 0 : 500;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, uint64_t stream, void** parameters, void** extra) {
    CHECKED;
    if (x == 0 || y != 1 || z != 1 || threads != THREADS || threads_y != 1 || threads_z != 1) return 1;
    if (shared || extra) return 1;
    if (contexts.back() == 0) return 201;
    launches++;
    launch_stream = stream;
    launch_context = contexts.back();
    const auto kernel = reinterpret_cast<void (*)(const Arguments*, unsigned)>(function);
    if (!idle) kernel(static_cast<const Arguments*>(parameters[0]), x);
    return 0;
}

int cuGetErrorName(int result, const char** name) {
    *name = result == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : result == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
    return *name ? 0 : 1;
}

const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_INTERNAL_ERROR"; }

int nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 4;
    return 0;
}

int nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof nvrtc_architectures / sizeof(int);
    return 0;
}

int nvrtcGetSupportedArchs(int* found) {
    memcpy(found, nvrtc_architectures, sizeof nvrtc_architectures);
    return 0;
}

int nvrtcCreateProgram(Program** program, const char* source, const char*, int headers, const char**, const char**) {
    CHECKED;
    *program = new Program{{source, source + strlen(source) + 1}, {log_text, log_text + sizeof log_text}};
    return headers;
}

int nvrtcCompileProgram(Program*, int count, const char** options) {
    CHECKED;
    return count == 2 && strstr(options[0], "--gpu-architecture=") && !strcmp(options[1], "--std=c++17") ? 0 : 5;
}

int nvrtcDestroyProgram(Program** program) {
    delete *program;
    return 0;
}

#define OUTPUT_OF(WHAT, FIELD)                                        \
    int nvrtcGet##WHAT##Size(Program* program, size_t* size) {        \
        *size = program->FIELD.size();                                \
        return 0;                                                     \
    }                                                                 \
    int nvrtcGet##WHAT(Program* program, char* text) {                \
        memcpy(text, program->FIELD.data(), program->FIELD.size());   \
        return 0;                                                     \
    }

OUTPUT_OF(CUBIN, source)
OUTPUT_OF(PTX, source)
OUTPUT_OF(ProgramLog, log)
}
