// A program around decode.cu: decodes the packed buffers of a file. Each array has exactly its own bytes of memory, so
// that the address sanitizer notices an access one byte outside.
//
// A record is a `Record`, then the levels' bytes where there are any, then the packed buffer. The output is the
// weights.

#include <cstdio>
#include <cstdlib>

struct Record {
    char name[16];
    uint64_t weights, programs, level_bytes, data_bytes, coarse, fine, scales;
};

static u8* read_bytes(FILE* file, uint64_t count) {
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 16, count) || fread(bytes, 1, count, file) != count) exit(2);
    return static_cast<u8*>(bytes);
}

int main(int, char** paths) {
    FILE *input = fopen(paths[1], "rb"), *output = fopen(paths[2], "wb");
    if (!input || !output) return 2;
    Record record;
    while (fread(&record, sizeof record, 1, input) == 1) {
        u8* levels = record.level_bytes ? read_bytes(input, record.level_bytes) : nullptr;
        u8* data = read_bytes(input, record.data_bytes);
        const uint64_t bytes = record.weights * sizeof(OUTPUT::Element);
        void* out = nullptr;
        if (posix_memalign(&out, 16, bytes)) return 2;
        memset(out, 0xee, bytes);
        const Arguments arguments = {reinterpret_cast<const u16*>(levels ? levels : data), data + record.coarse,
                                     data + record.fine, data + record.scales, static_cast<u8*>(out),
                                     static_cast<u32>(record.weights)};
        bool known = false;
#define CALL(NAME, ...) \
    if (!strcmp(record.name, #NAME)) NAME(&arguments, record.programs), known = true;
        FORMATS(CALL)
        if (!known || fwrite(out, 1, bytes, output) != bytes) return 3;
        free(levels);
        free(data);
        free(out);
    }
    return fclose(output) ? 2 : 0;
}
