import platform
def test_x():
    print(platform.uname())
