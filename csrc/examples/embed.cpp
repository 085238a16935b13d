// embed.c once more, in C++17: the handle has an owner, and a status that is not OK is an exception.
//
//     c++ -std=c++17 embed.cpp $(pkg-config --cflags --libs autoclip) -o embed

#include <autoclip.h>
#include <iostream>
#include <memory>
#include <stdexcept>

static void must(autoclip_status status) {
    if (status != AUTOCLIP_OK) throw std::runtime_error(autoclip_status_message(status));
}

struct Destroy {
    void operator()(autoclip_history *history) const { autoclip_history_destroy(history); }
};

int main() {
    autoclip_history *created;
    must(autoclip_history_create(0, nullptr, &created));
    const std::unique_ptr<autoclip_history, Destroy> history(created);
    for (const double norm : {4.0, 1.0, 3.0, 2.0}) {
        double threshold;
        must(autoclip_history_observe(history.get(), norm, 10.0, &threshold));
        std::cout << "norm " << norm << " threshold " << threshold << '\n';
    }
}
